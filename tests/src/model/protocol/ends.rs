//! The two ends of a session in the model: the product's own cores, one step at a time.
//!
//! A worker's core knows times. In the model they are only past, future or stale: no two states differ by more.

use alloy_shared::env::{Mono, Now};
use alloy_shared::id::BootId;
use alloy_shared::limits::Limits;
use alloy_shared::wire::session::{Held, Report, SlotState, SlotView};
use worker::session::{Core, Effect, Input};

use super::super::pool::Identity;
use super::books::NOW;

/// A worker's core and its clock.
#[derive(Debug, Clone)]
pub struct Daemon {
    core: Core,
    now: Mono,
    /// When its lease ends.
    fence: Option<Mono>,
}

/// When an input comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum When {
    Now,
    /// The next moment at which the core wants to be asked: a heartbeat is due, or a pause is over.
    AtWake,
    /// The end of its lease.
    AtFence,
}

/// So far away that only an action of its own gets there: a lease ends when the model says so.
const FAR: u64 = 1 << 40;

/// A worker's limits in the model.
pub fn limits() -> Limits {
    Limits { self_fence_ms: FAR, link_silent_ms: 1 << 50, ..super::books::limits() }
}

impl Daemon {
    pub fn start(held: Vec<(Held, Vec<(u64, Report)>)>) -> Self {
        let core = Core::restore(held, BootId::from_raw(1), limits());
        let mut daemon = Self { core, now: NOW.mono, fence: None };
        let slot = SlotView { state: SlotState::Warm, attempt: None, image: None };
        daemon.handle(Input::Slots(vec![slot]), When::Now);
        daemon
    }

    pub fn handle(&mut self, input: Input, when: When) -> Vec<Effect> {
        self.now = match when {
            When::Now => self.now,
            When::AtWake => self.core.next_wake().max(self.now),
            When::AtFence => self.fence.take().unwrap_or(self.now),
        };
        let effects = self.core.handle(input, Now { mono: self.now, wall: NOW.wall }, 0);
        for effect in &effects {
            if let Effect::FenceAt(at) = effect {
                self.fence = Some(*at);
            }
        }
        effects
    }

    pub fn has_log(&self) -> bool {
        self.core.has_log()
    }

    pub fn is_up(&self) -> bool {
        self.core.is_up()
    }

    /// What tells it from others, apart from how long ago things happened.
    pub fn identity(&self) -> Identity {
        Identity::of(&self.short())
    }

    fn short(&self) -> String {
        let text = format!("{:?} {}", self.core, self.fence.is_some());
        let stale = self.now.0.saturating_sub(2 * limits().heartbeat_ms);
        let mut short = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once("Mono(") {
            short.push_str(before);
            let (number, after) = after.split_once(')').unwrap_or((after, ""));
            short.push_str(match number.parse::<u64>().unwrap_or(0) {
                0 => "0",
                at if at <= stale => "stale",
                at if at <= self.now.0 => "past",
                _ => "future",
            });
            rest = after;
        }
        short.push_str(rest);
        // The log's window follows the line's speed; two bytes fit into any.
        let mut text = String::with_capacity(short.len());
        let mut parts = short.split("window: ");
        text.push_str(parts.next().unwrap_or(""));
        for part in parts {
            text.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
        }
        text
    }
}
