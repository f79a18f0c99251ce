//! What EC2 says of the machine's future: a spot instance that is taken back, one that should be left, one that its
//! auto-scaling group ends. Asked every five seconds, as AWS advises; the notice comes two minutes ahead.

use std::time::Duration;

use super::metadata::Metadata;
use crate::clock::Clock;
use crate::error::Result;
use crate::events::{Event, Events};

const EVERY: Duration = Duration::from_secs(5);

/// The service's tokens are taken for ten minutes and made anew in time.
const TOKEN_LIFE: Duration = Duration::from_secs(480);

const INTERRUPTION: &str = "/latest/meta-data/spot/instance-action";
const REBALANCE: &str = "/latest/meta-data/events/recommendations/rebalance";
const LIFECYCLE: &str = "/latest/meta-data/autoscaling/target-lifecycle-state";

/// Returns once the machine is going away. A service that does not answer says nothing: it is asked again.
pub(super) async fn until_leaving(endpoint: Option<&str>, clock: &Clock, events: &Events) -> String {
    let Some(endpoint) = endpoint else { return std::future::pending().await };
    let mut session: Option<(Metadata, Duration)> = None;
    let (mut advised, mut silent) = (false, false);
    loop {
        match look(endpoint, &mut session, clock, &mut advised, events).await {
            Ok(Some(what)) => {
                events.emit(Event::Notice { what: what.clone(), leaves: true });
                return what;
            }
            Ok(None) => silent = false,
            Err(error) => {
                session = None;
                if !std::mem::replace(&mut silent, true) {
                    events.warning(format!("notices of the platform cannot be heard: {error}"));
                }
            }
        }
        clock.sleep(EVERY).await;
    }
}

async fn look(
    endpoint: &str,
    session: &mut Option<(Metadata, Duration)>,
    clock: &Clock,
    advised: &mut bool,
    events: &Events,
) -> Result<Option<String>> {
    let now = clock.monotonic();
    let current = session.take().filter(|(_, since)| now.saturating_sub(*since) < TOKEN_LIFE);
    let (metadata, since) = match current {
        Some(current) => current,
        None => (Metadata::open(endpoint).await?, now),
    };
    let interruption = metadata.get(INTERRUPTION).await?.map(|text| format!("spot interruption {}", text.trim()));
    let lifecycle = metadata.get(LIFECYCLE).await?;
    let ended =
        lifecycle.filter(|state| state.trim() == "Terminated").map(|_| "its auto-scaling group ends it".to_owned());
    if let (false, Some(advice)) = (*advised, metadata.get(REBALANCE).await?) {
        *advised = true;
        events.emit(Event::Notice { what: format!("rebalance recommendation {}", advice.trim()), leaves: false });
    }
    *session = Some((metadata, since));
    Ok(interruption.or(ended))
}
