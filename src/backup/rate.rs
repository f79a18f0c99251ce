//! How fast a backup reads, when somebody has said how fast it may: a token bucket, kept as the time up to which its bytes are
//! spoken for. Pure.

use std::time::Duration;

use crate::model::ByteSize;

/// What was not used is not saved up, but for so long: whoever wakes up late makes up for it.
const BURST: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy)]
pub struct Rate {
    bytes_a_second: u64,
    spoken_for: Duration,
}

impl Rate {
    /// No bound by a rate of nothing.
    pub fn new(bytes_a_second: ByteSize) -> Option<Rate> {
        (bytes_a_second.0 > 0).then_some(Rate { bytes_a_second: bytes_a_second.0, spoken_for: Duration::ZERO })
    }

    /// Speaks for so many bytes, at a moment of a clock that never goes back; how long to wait before they are read. At any
    /// moment no more was let through than the rate times what has passed, a burst, and the last ones.
    pub fn wait(&mut self, bytes: u64, now: Duration) -> Duration {
        let begin = self.spoken_for.max(now.saturating_sub(BURST));
        let nanos = (u128::from(bytes) * 1_000_000_000).div_ceil(u128::from(self.bytes_a_second));
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.spoken_for = begin.saturating_add(takes);
        begin.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;
    const START: Duration = Duration::from_secs(1000);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn bytes_are_let_through_at_the_rate_and_rest_is_not_saved_up() {
        let mut rate = Rate::new(ByteSize(10 * MB)).expect("a bound");
        assert_eq!(rate.wait(MB, START), Duration::ZERO);
        assert_eq!(rate.wait(MB, START), Duration::ZERO, "a burst of a tenth of a second");
        assert_eq!(rate.wait(MB, START), ms(100));
        assert_eq!(rate.wait(5 * MB, START + ms(100)), ms(100));
        assert_eq!(rate.wait(0, START + ms(200)), ms(500));
        // Half an hour of silence is worth no more than the burst.
        let later = START + Duration::from_secs(1800);
        assert_eq!(rate.wait(2 * MB, later), Duration::ZERO);
        assert_eq!(rate.wait(MB, later), ms(100));
        assert!(Rate::new(ByteSize(0)).is_none());
        assert!(Rate::new(ByteSize(1)).expect("a bound").wait(u64::MAX, START) == Duration::ZERO);
    }

    #[test]
    fn whatever_the_pieces_and_however_late_its_sleeper_wakes_it_is_never_faster() {
        let bytes_a_second = 3 * MB;
        let mut rate = Rate::new(ByteSize(bytes_a_second)).expect("a bound");
        let (mut now, mut through, mut number) = (START, 0_u64, 1_u64);
        for _ in 0..10_000 {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (bytes, late) = ((number >> 33) % MB, (number >> 20) % 40);
            now += rate.wait(bytes, now) + ms(late);
            let most = bytes_a_second as f64 * (now - START + BURST).as_secs_f64();
            assert!(through as f64 <= most + 1.0, "{through} bytes after {:?}", now - START);
            through += bytes;
        }
        let slowest = (now - START).as_secs_f64() * bytes_a_second as f64;
        assert!(through as f64 > slowest * 0.9, "it is not much slower either: {through} of {slowest}");
    }
}
