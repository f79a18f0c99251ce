//! Timeline history files: which timeline a timeline came from, and where.

use crate::model::{Lsn, Malformed, Timeline};

/// One line of a history file: `timeline` was left at `at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switch {
    pub timeline: Timeline,
    pub at: Lsn,
}

/// The ancestry of one timeline, oldest first; timeline 1 has no file and no switches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    pub timeline: Timeline,
    pub switches: Vec<Switch>,
}

impl History {
    /// A timeline without ancestors.
    pub fn root(timeline: Timeline) -> History {
        History { timeline, switches: Vec::new() }
    }

    /// Reads the file as `readTimeLineHistory` does: blank lines and `#` comments are skipped, timelines must increase.
    pub fn parse(timeline: Timeline, text: &str) -> Result<History, Malformed> {
        let mut switches: Vec<Switch> = Vec::new();
        for line in text.lines() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let malformed = || Malformed::new("timeline history line", line, "a timeline, a position and a reason");
            let mut fields = line.split_whitespace();
            let parent: Timeline = fields.next().and_then(|f| f.parse().ok()).ok_or_else(malformed)?;
            let at: Lsn = fields.next().and_then(|f| f.parse().ok()).ok_or_else(malformed)?;
            let ordered = switches.last().is_none_or(|before| before.timeline < parent);
            if !ordered || parent >= timeline {
                return Err(malformed());
            }
            switches.push(Switch { timeline: parent, at });
        }
        // Recovery that stopped before an earlier switch writes the whole history of its target and its own, earlier
        // end (`writeTimeLineHistory`): what came after that end was never on the way.
        let mut end = Lsn(u64::MAX);
        for switch in switches.iter_mut().rev() {
            end = end.min(switch.at);
            switch.at = end;
        }
        Ok(History { timeline, switches })
    }

    /// Where `timeline` ends on the way to ours: its switch point, or `None` for our own, which has no end yet.
    /// The outer `None` says that `timeline` is not an ancestor.
    pub fn end_of(&self, timeline: Timeline) -> Option<Option<Lsn>> {
        if timeline == self.timeline {
            return Some(None);
        }
        self.switches.iter().find(|switch| switch.timeline == timeline).map(|switch| Some(switch.at))
    }

    /// Whether what `timeline` has up to `lsn` is on the way to ours.
    pub fn has(&self, timeline: Timeline, lsn: Lsn) -> bool {
        self.end_of(timeline).is_some_and(|end| end.is_none_or(|end| lsn <= end))
    }

    /// The timelines on the way, oldest first, with where each begins (zero for the first) and ends.
    pub fn spans(&self) -> impl DoubleEndedIterator<Item = (Timeline, Lsn, Option<Lsn>)> + '_ {
        let begins = std::iter::once(Lsn(0)).chain(self.switches.iter().map(|switch| switch.at));
        let ends = self.switches.iter().map(|s| (s.timeline, Some(s.at))).chain([(self.timeline, None)]);
        let spans: Vec<_> = begins.zip(ends).map(|(begin, (timeline, end))| (timeline, begin, end)).collect();
        spans.into_iter().filter(|(_, begin, end)| end.is_none_or(|end| *begin < end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_tells_where_each_ancestor_ends() {
        let text =
            "# comment\n\n1\t0/5000000\tno recovery target specified\n2 0/7000028 before 2026-11-22 18:00:00+00\n";
        let history = History::parse(Timeline(4), text).expect("well formed");
        assert_eq!(history.end_of(Timeline(1)), Some(Some(Lsn(0x500_0000))));
        assert_eq!(history.end_of(Timeline(3)), None);
        assert_eq!(history.end_of(Timeline(4)), Some(None));
        let spans: Vec<_> = history.spans().collect();
        assert_eq!(spans[0], (Timeline(1), Lsn(0), Some(Lsn(0x500_0000))));
        assert_eq!(spans[1], (Timeline(2), Lsn(0x500_0000), Some(Lsn(0x700_0028))));
        assert_eq!(spans[2], (Timeline(4), Lsn(0x700_0028), None));
    }

    #[test]
    fn recovery_that_stopped_before_an_earlier_switch_leaves_that_switch_behind() {
        let history = History::parse(Timeline(3), "1 0/700 r\n2 0/500 r").expect("as PostgreSQL writes it");
        assert_eq!(history.end_of(Timeline(1)), Some(Some(Lsn(0x500))));
        let spans: Vec<_> = history.spans().collect();
        assert_eq!(spans, [(Timeline(1), Lsn(0), Some(Lsn(0x500))), (Timeline(3), Lsn(0x500), None)]);
    }

    #[test]
    fn a_history_that_contradicts_itself_is_refused() {
        for bad in ["x 0/1 r", "1", "2 0/5 r\n1 0/6 r", "3 0/5 r", "5 0/5 r"] {
            assert!(History::parse(Timeline(3), bad).is_err(), "{bad:?}");
        }
    }
}
