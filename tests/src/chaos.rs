//! What breaks a farm on purpose: dice and random instants, a stage whose connections can be broken and whose history is
//! written down, a watch on the list of processes.

use std::time::Duration;

pub mod follow;
pub mod stage;
pub mod watch;

pub struct Dice(u64);

impl Dice {
    /// `ALLOY_SEED`, else other dice in every run. The seed is printed.
    pub fn from_environment() -> Dice {
        let given = std::env::var("ALLOY_SEED").ok().and_then(|text| text.parse().ok());
        let seed = given.unwrap_or_else(|| u64::from(std::process::id()) << 16 | 1);
        println!("ALLOY_SEED={seed}");
        Dice(seed)
    }

    pub fn seeded(seed: u64) -> Dice {
        Dice(seed)
    }

    /// The dice of a part of a test, which roll the same whatever other parts do meanwhile.
    pub fn apart(&self, part: u64) -> Dice {
        Dice(crate::noise::mix(self.0 ^ crate::noise::mix(part)))
    }

    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    /// Another order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.roll(last as u64 + 1) as usize);
        }
    }

    /// Returns at a random instant of the time to come.
    pub async fn instant(&mut self, within_ms: u64) {
        pause(Duration::from_millis(self.roll(within_ms))).await;
    }
}

/// The beat of whoever looks again and again, or lets something happen now and then.
pub async fn pause(beat: Duration) {
    tokio::time::sleep(beat).await;
}
