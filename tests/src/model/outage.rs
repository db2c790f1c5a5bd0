//! The rule that keeps leases over an outage of the database, with time: two orchestrators, a database, one worker, ticks of
//! one heartbeat.
//!
//! It is a model of the rules, because several orchestrators on one database are not built: nothing in the product
//! stands beside it yet but [`Limits`], whose numbers it takes. The rules:
//!
//! - (a) an orchestrator that has lost the database answers heartbeats provisionally, and only those of a worker whose
//!   session it owns; it opens no session;
//! - (b) a provisional answer renews the worker's lease, but not its longer bound since the last durable one;
//! - (c) a worker is lost after `expiry_ms` if its owner's own row is fresh, else after the longer expiry;
//! - (d) whoever gets the database back writes the heartbeats that it kept in the transaction that refreshes its row;
//! - (e) nobody calls a worker lost before it has had the database for a whole expiry without a break;
//! - (f) a worker that is refused elsewhere goes back to its owner;
//! - (g) but once it has said hello elsewhere it believes no provisional answer until a durable one: that hello may have
//!   taken it over although its answer was lost.

use std::sync::Arc;

use alloy_shared::limits::Limits;
use stateright::{Model, Property};

use super::Seen;
use super::mutant::Mutant;

/// Numbers that several orchestrators add to [`Limits`], in ticks.
const DURABLE_BOUND: u8 = 20;
const LONG_EXPIRY: u8 = 24;
const ROW_FRESH: u8 = 2;
/// The longest outage that must end no attempt.
const OUTAGE_BORNE: u8 = 10;
const AGE_MAX: u8 = LONG_EXPIRY + 1;

/// The product's numbers in ticks of a heartbeat.
#[derive(Debug, Clone, Copy)]
struct Ticks {
    fence: u8,
    kill: u8,
    expiry: u8,
    grace: u8,
}

impl Ticks {
    fn of(limits: &Limits) -> Self {
        let ticks = |ms: u64| (ms / limits.heartbeat_ms) as u8;
        Self {
            fence: ticks(limits.self_fence_ms),
            kill: ticks(limits.kill_budget_ms),
            expiry: ticks(limits.expiry_ms),
            grace: ticks(limits.startup_grace_ms),
        }
    }
}

/// What can be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Line {
    /// Between the worker and an orchestrator.
    Worker(u8),
    /// Between an orchestrator and the database.
    Store(u8),
    /// The database itself.
    Database,
}

const LINES: [Line; 5] = [Line::Worker(0), Line::Worker(1), Line::Store(0), Line::Store(1), Line::Database];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Replica {
    /// How long it has had the database without a break.
    contact: u8,
    /// The age of the newest heartbeat that it heard and could not write.
    kept: Option<u8>,
    /// It believes that the worker's session is its own.
    owns: bool,
    /// The age of its own row.
    row: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Farm {
    cut: [bool; 5],
    replicas: [Replica; 2],
    /// What the database says: whose session it is and how long ago the worker was heard.
    owner: u8,
    seen: u8,
    /// The job was given away.
    given_away: bool,
    worker: Worker,
    /// Lines that may still be cut or mended.
    changes: u8,
    /// How long the database has been away.
    outage: u8,
    /// Nothing happened yet but outages of the database that must be borne.
    only_outages: bool,
    /// A provisional answer was believed since the last durable one.
    provisional: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Worker {
    at: u8,
    /// Who last opened a session for it, as far as it knows.
    owner: u8,
    /// It said hello elsewhere and heard no durable answer since.
    strayed: bool,
    /// Since it sent the heartbeat that was last answered, and last answered durably.
    answered: u8,
    durable: u8,
    /// What is left of the time that the VM takes to die.
    dying: Option<u8>,
    alive: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// A line is cut or mended.
    Change(Line),
    /// A heartbeat's time passes; the worker stays where it is.
    Tick,
    /// The same, and the worker, cut off, says hello to an orchestrator.
    Hello(u8),
    /// The hello is heard and its answer is lost.
    HelloUnanswered(u8),
}

#[derive(Debug, Clone)]
pub struct Outage {
    changes: u8,
    mutant: Option<Mutant>,
    ticks: Ticks,
    pub seen: Arc<Seen>,
}

impl Outage {
    /// How many lines are cut or mended.
    pub const SMALL: u8 = 4;
    pub const LARGE: u8 = 6;

    /// Explores every order of so many cuts and mends.
    pub fn new(changes: u8, mutant: Option<Mutant>) -> Self {
        let mut ticks = Ticks::of(&Limits::default());
        if mutant == Some(Mutant::LateFence) {
            ticks.fence = ticks.expiry;
        }
        Self { changes, mutant, ticks, seen: Arc::default() }
    }

    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    fn tick(&self, farm: &mut Farm, hello: Option<(u8, bool)>) {
        farm.age();
        if let Some((to, answered)) = hello {
            self.hello(farm, to, answered);
        }
        self.beat(farm);
        for r in 0..2 {
            self.refresh(farm, r);
        }
        if (0..2).any(|r| farm.has_store(r) && self.reaps(farm, r)) {
            farm.given_away = true;
        }
        self.fence(farm);
    }

    /// Opens a session, or goes back to one. Only the owner takes a worker in without the database.
    fn hello(&self, farm: &mut Farm, to: u8, answered: bool) {
        if to != farm.worker.owner && !self.is(Mutant::HelloForgotten) {
            farm.worker.strayed = true;
        }
        if farm.has_store(to) {
            (farm.owner, farm.seen) = (to, 0);
            farm.replicas[usize::from(to)].owns = true;
            if answered {
                farm.worker = Worker { at: to, owner: to, ..farm.worker };
                farm.answer_durably();
            }
        } else if farm.replicas[usize::from(to)].owns || self.is(Mutant::AckFromNonOwner) {
            farm.worker.at = to;
        }
    }

    /// The worker's heartbeat, if it gets through, and its answer.
    fn beat(&self, farm: &mut Farm) {
        let r = farm.worker.at;
        if farm.is_cut(Line::Worker(r)) {
            return;
        }
        if farm.has_store(r) {
            // A session that is not the worker's newest is over.
            if farm.owner == r {
                farm.seen = 0;
                farm.answer_durably();
            }
            return;
        }
        let replica = &mut farm.replicas[usize::from(r)];
        let own = replica.owns && farm.worker.owner == r && !farm.worker.strayed;
        if own {
            replica.kept = Some(0);
        }
        if (own || self.is(Mutant::AckFromNonOwner)) && !self.is(Mutant::NoProvisionalAcks) {
            farm.worker.answered = 0;
            farm.provisional = true;
        }
    }

    /// An orchestrator that has the database refreshes its row, and writes what it kept.
    fn refresh(&self, farm: &mut Farm, r: u8) {
        let has_store = farm.has_store(r);
        let owns = farm.owner == r;
        let replica = &mut farm.replicas[usize::from(r)];
        if !has_store {
            replica.contact = 0;
            return;
        }
        replica.contact = (replica.contact + 1).min(self.ticks.grace);
        replica.row = 0;
        replica.owns = owns;
        let kept = replica.kept.take();
        if let Some(age) = kept.filter(|_| owns && !self.is(Mutant::NoFlush)) {
            farm.seen = farm.seen.min(age);
        }
    }

    fn reaps(&self, farm: &Farm, r: u8) -> bool {
        let fresh = farm.replicas[usize::from(farm.owner)].row < ROW_FRESH || self.is(Mutant::ExpiryNotExtended);
        let expiry = if fresh { self.ticks.expiry } else { LONG_EXPIRY };
        farm.replicas[usize::from(r)].contact >= self.ticks.grace && farm.seen > expiry
    }

    /// The worker's own clock: it kills its VM when its lease or the longer bound is over.
    fn fence(&self, farm: &mut Farm) {
        let worker = &mut farm.worker;
        let bound = worker.durable >= DURABLE_BOUND && !self.is(Mutant::UnboundedProvisionalAcks);
        match &mut worker.dying {
            // What is killed stays killed, whatever is answered meanwhile.
            Some(0) => worker.alive = false,
            Some(left) => *left -= 1,
            None if worker.answered >= self.ticks.fence || bound => worker.dying = Some(self.ticks.kill),
            None => {}
        }
    }
}

fn older(age: u8) -> u8 {
    (age + 1).min(AGE_MAX)
}

impl Farm {
    fn is_cut(&self, line: Line) -> bool {
        LINES.iter().zip(self.cut).any(|(other, cut)| *other == line && cut)
    }

    fn has_store(&self, r: u8) -> bool {
        !self.is_cut(Line::Store(r)) && !self.is_cut(Line::Database)
    }

    fn answer_durably(&mut self) {
        (self.worker.answered, self.worker.durable, self.worker.strayed) = (0, 0, false);
        self.provisional = false;
    }

    fn age(&mut self) {
        self.seen = older(self.seen);
        self.worker.answered = older(self.worker.answered);
        self.worker.durable = older(self.worker.durable);
        for replica in &mut self.replicas {
            replica.row = (replica.row + 1).min(ROW_FRESH);
            replica.kept = replica.kept.map(older);
        }
        self.outage = if self.is_cut(Line::Database) { (self.outage + 1).min(OUTAGE_BORNE + 1) } else { 0 };
        self.only_outages &= self.outage <= OUTAGE_BORNE;
    }
}

impl Model for Outage {
    type State = Farm;
    type Action = Action;

    fn init_states(&self) -> Vec<Farm> {
        let replica = |owns| Replica { contact: self.ticks.grace, kept: None, owns, row: 0 };
        let worker = Worker { at: 0, owner: 0, strayed: false, answered: 0, durable: 0, dying: None, alive: true };
        vec![Farm {
            cut: [false; 5],
            replicas: [replica(true), replica(false)],
            owner: 0,
            seen: 0,
            given_away: false,
            worker,
            changes: self.changes,
            outage: 0,
            only_outages: true,
            provisional: false,
        }]
    }

    fn actions(&self, farm: &Farm, actions: &mut Vec<Action>) {
        if farm.given_away {
            return;
        }
        actions.push(Action::Tick);
        if farm.changes > 0 {
            actions.extend(LINES.map(Action::Change));
        }
        if farm.is_cut(Line::Worker(farm.worker.at)) {
            for r in (0..2).filter(|r| !farm.is_cut(Line::Worker(*r))) {
                actions.push(Action::Hello(r));
                actions.extend((farm.changes > 0).then_some(Action::HelloUnanswered(r)));
            }
        }
    }

    fn next_state(&self, farm: &Farm, action: Action) -> Option<Farm> {
        let mut farm = *farm;
        match action {
            Action::Change(line) => {
                farm.changes -= 1;
                farm.only_outages &= line == Line::Database;
                for (other, cut) in LINES.iter().zip(&mut farm.cut) {
                    *cut ^= *other == line;
                }
            }
            Action::Tick => self.tick(&mut farm, None),
            Action::Hello(r) => self.tick(&mut farm, Some((r, true))),
            Action::HelloUnanswered(r) => {
                farm.changes -= 1;
                self.tick(&mut farm, Some((r, false)));
            }
        }
        Some(farm)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(VM_GONE_FIRST, |m: &Outage, f: &Farm| {
                m.seen.always(0, || !(f.given_away && f.worker.alive))
            }),
            Property::always(OUTAGE_IS_BORNE, |m, f: &Farm| {
                m.seen.always(1, || !(f.only_outages && (f.worker.dying.is_some() || f.given_away)))
            }),
            Property::sometimes("a worker lives through an outage on provisional answers", |m, f: &Farm| {
                m.seen.sometimes(2, || f.provisional && f.worker.durable > m.ticks.fence && f.worker.dying.is_none())
            }),
            Property::sometimes("a worker kills its VM because nothing durable came for too long", |m, f: &Farm| {
                m.seen.sometimes(3, || f.provisional && f.worker.answered == 0 && f.worker.dying.is_some())
            }),
            Property::sometimes("a job is given away", |m, f: &Farm| m.seen.sometimes(4, || f.given_away)),
            Property::sometimes("the other orchestrator takes a worker over", |m, f: &Farm| {
                m.seen.sometimes(5, || f.owner == 1 && f.worker.owner == 1)
            }),
            Property::sometimes("a worker is taken over and does not know it", |m, f: &Farm| {
                m.seen.sometimes(6, || f.owner == 1 && f.worker.owner == 0 && f.worker.strayed)
            }),
            Property::sometimes("a worker is spared because its owner is blind", |m, f: &Farm| {
                m.seen.sometimes(7, || {
                    let looks = f.replicas.iter().any(|replica| replica.contact >= m.ticks.grace);
                    looks && f.seen > m.ticks.expiry && !f.given_away
                })
            }),
        ]
    }
}

pub const VM_GONE_FIRST: &str = "a job is given away only when its VM is gone";
pub const OUTAGE_IS_BORNE: &str = "an outage of the database of 50 s by itself ends no attempt";
