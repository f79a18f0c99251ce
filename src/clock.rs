//! The only door to time, sleep and chance. A `Clock` is handed in wherever one of the three is needed, so that tests
//! and simulations can hand in their own.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::model::Timestamp;

/// What a clock is made of. `monotonic` never goes backwards and counts from an arbitrary start.
pub trait Source: Send + Sync + fmt::Debug {
    fn now(&self) -> Timestamp;
    fn monotonic(&self) -> Duration;
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>>;
    fn fill_random(&self, bytes: &mut [u8]);
}

/// A handle to a source of time and chance; clones share it.
#[derive(Debug, Clone)]
pub struct Clock(Arc<dyn Source>);

impl Clock {
    pub fn new(source: Arc<dyn Source>) -> Clock {
        Clock(source)
    }

    /// The machine's own clock and the kernel's random numbers.
    pub fn system() -> Clock {
        Clock(Arc::new(System { started: started() }))
    }

    /// Wall time: for people and for policy, never for ordering writes.
    pub fn now(&self) -> Timestamp {
        self.0.now()
    }

    pub fn monotonic(&self) -> Duration {
        self.0.monotonic()
    }

    pub async fn sleep(&self, duration: Duration) {
        self.0.sleep(duration).await;
    }

    /// The future's output, or `None` once `limit` has passed; the future is then dropped.
    pub async fn within<F: Future>(&self, limit: Duration, future: F) -> Option<F::Output> {
        tokio::select! {
            biased;
            output = future => Some(output),
            () = self.sleep(limit) => None,
        }
    }

    pub fn random<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.fill_random(&mut bytes);
        bytes
    }

    /// A number in `0.0..1.0`, for jitter.
    pub fn random_share(&self) -> f64 {
        f64::from(u32::from_le_bytes(self.random())) / (f64::from(u32::MAX) + 1.0)
    }
}

#[derive(Debug)]
struct System {
    started: std::time::Instant,
}

#[allow(clippy::disallowed_methods, reason = "this is the door")]
fn started() -> std::time::Instant {
    std::time::Instant::now()
}

#[allow(clippy::disallowed_methods, reason = "this is the door")]
impl Source for System {
    fn now(&self) -> Timestamp {
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Timestamp::from_unix_micros(i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX))
    }

    fn monotonic(&self) -> Duration {
        self.started.elapsed()
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(duration))
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        let mut filled = 0;
        // The kernel hands out up to 256 bytes at once and fails only before its pool is ready, early at boot.
        while filled < bytes.len() {
            match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
                Ok(count) => filled += count,
                Err(_) => std::thread::yield_now(),
            }
        }
    }
}
