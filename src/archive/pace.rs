//! How long WAL is held back at an RPO above zero, so that it is durable in time: the rest of the time is the request's.
//! Pure.

use std::time::Duration;

/// What a request is given at least and at most, as a share of the RPO.
const LEAST: f64 = 0.25;
const MOST: f64 = 0.75;

/// Remembers how long requests take: believes a slower one at once, and forgets it slowly.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    rpo: Duration,
    request: Duration,
}

impl Pace {
    pub fn new(rpo: Duration) -> Pace {
        Pace { rpo, request: Duration::ZERO }
    }

    /// An entry became durable that was sent so long ago.
    pub fn landed(&mut self, took: Duration) {
        let faster = self.request.saturating_sub(took);
        self.request = took.max(self.request - faster / 8);
    }

    /// How long the oldest byte may wait before it is sent.
    pub fn hold(&self) -> Duration {
        // The next one may be slower than the last ones.
        let rest = (self.request * 3 / 2).clamp(self.rpo.mul_f64(LEAST), self.rpo.mul_f64(MOST));
        self.rpo - rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_slows_down_is_given_more_of_the_time_and_one_that_is_fast_again_less() {
        let ms = Duration::from_millis;
        let mut pace = Pace::new(ms(1000));
        assert_eq!(pace.hold(), ms(750));
        pace.landed(ms(20));
        assert_eq!(pace.hold(), ms(750));
        pace.landed(ms(400));
        assert_eq!(pace.hold(), ms(400));
        pace.landed(ms(60_000));
        assert_eq!(pace.hold(), ms(250), "however slow, requests do not become more than four for each RPO");
        (0..100).for_each(|_| pace.landed(ms(20)));
        assert_eq!(pace.hold(), ms(750));
        assert_eq!(Pace::new(Duration::ZERO).hold(), Duration::ZERO);
    }
}
