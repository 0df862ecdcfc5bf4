//! A world: the real brain, a body that carries out its commands over modelled wires, programs that need blocks, and
//! a clock that jumps from one event to the next. No threads, no real time: the same set-up gives the same run.

use crate::actor::{Actor, Held};
use crate::checker::{Checker, Violation, Waiting};
use crate::faults::Faults;
use crate::program::{Figures, Mark, Program, ScheduleModel};
use crate::rng::Rng;
use crate::wire::{Request, Source, Wire, WireModel};
use overspill_core::word::{self, Retire};
use overspill_core::{
    BlockId, BlockSize, Brain, Command, Config, Event, Nanos, Prefetch, Refusal, ScheduleId, SequenceId, StepId,
    Ticket, TierId, TooSmall, TransferId,
};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// How much is checked while a world runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Checks {
    /// Nothing: for planning.
    #[default]
    Off,
    /// Every invariant, after every event.
    On,
    /// The brain's own books too.
    Audit,
}

/// Everything that a world begins with.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What the brain is told.
    pub config: Config,
    /// The disks, as blocks number them.
    pub disks: Vec<WireModel>,
    /// For each tier that has a parent, the link from it; ignored for others.
    pub uploads: Vec<WireModel>,
    /// The schedules that programs refer to. Each is registered when a program first needs it.
    pub schedules: Vec<ScheduleModel>,
    /// What runs.
    pub programs: Vec<Program>,
    /// What goes wrong.
    pub faults: Faults,
    /// Where chance begins.
    pub seed: u64,
    /// How much is checked.
    pub checks: Checks,
    /// Whether steps are told late while the brain is quiet, as an engine may do.
    pub lazy: bool,
    /// A run of more events than this counts as one that never ends.
    pub events_max: u64,
}

/// What has come of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Events told and commands carried out.
    pub events: u64,
    /// When nothing moved any more.
    pub ended_at: Nanos,
    /// A hash of every command in order.
    pub trace_hash: u64,
    /// By program.
    pub figures: Vec<Figures>,
}

/// What the brain is to be told.
#[derive(Clone, Debug)]
pub(crate) enum Mail {
    Entered { sequence: SequenceId, step: StepId },
    StepTouched { sequence: SequenceId, step: StepId },
    Touched { tier: TierId, blocks: Vec<BlockId> },
    Expected { sequence: SequenceId, step: StepId, blocks: Vec<BlockId>, probability_milli: u16 },
    Demand(Ticket),
    Withdrawn(Ticket),
    Done(TransferId),
    Failed { transfer: TransferId, cancelled: bool },
    LastPin { tier: TierId, block: BlockId },
    Budget { tier: TierId, bytes: u64 },
    Close(SequenceId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wake {
    Wire(u32),
    /// The second number must still be the actor's.
    Actor(u32, u32),
    /// Leases that drop late.
    Release(u32),
    Patience(u32, Ticket),
    Budget(u32),
    Stop(u32),
}

/// A demand, from its making to its end.
#[derive(Clone, Debug)]
pub(crate) struct Wait {
    generation: u32,
    pub(crate) actor: usize,
    deadline: Nanos,
    on: Waiting,
    /// Its maker has gone; freed when the brain has been told.
    pub(crate) withdrawn: bool,
    ended: bool,
}

/// The world.
#[derive(Debug)]
pub struct World {
    pub(crate) brain: Brain,
    pub(crate) blocks: Vec<BlockSize>,
    pub(crate) now: Nanos,
    order: u64,
    heap: BinaryHeap<Reverse<(Nanos, u64, Wake)>>,
    mail: VecDeque<(Nanos, Mail)>,
    held_back: VecDeque<Mail>,
    /// By tier, by block.
    pub(crate) words: Vec<Vec<u64>>,
    wires: Vec<Wire>,
    disks: usize,
    waits: Vec<Wait>,
    free_waits: Vec<usize>,
    /// Demands that the brain knows, in the order in which it was told.
    waiting: Vec<usize>,
    pub(crate) actors: Vec<Actor>,
    pub(crate) schedules: Vec<ScheduleModel>,
    pub(crate) registered: Vec<Option<Result<ScheduleId, TooSmall>>>,
    pub(crate) late: Vec<Option<(TierId, Vec<Held>)>>,
    faults: Faults,
    rng: Rng,
    checker: Option<Box<Checker>>,
    pub(crate) broken: Option<String>,
    lazy: bool,
    prefetches: bool,
    has_parent: Vec<bool>,
    events: u64,
    events_max: u64,
    hash: u64,
    /// The ends of passes, in order.
    pub marks: Vec<Mark>,
    log: Option<Vec<String>>,
    pub(crate) spare: Vec<Vec<BlockId>>,
    pub(crate) uses: Option<Vec<(TierId, BlockId)>>,
}

impl World {
    /// A world in which nothing has happened yet.
    ///
    /// # Errors
    /// If a tier has no room for the largest block.
    pub fn new(setup: Setup) -> Result<Self, TooSmall> {
        let Setup { config, disks, uploads, schedules, programs, faults, seed, checks, .. } = setup;
        let checker = (checks != Checks::Off).then(|| Box::new(Checker::new(&config, checks == Checks::Audit)));
        let has_parent = config.tiers.iter().map(|t| t.parent.is_some()).collect();
        let prefetches = config.prefetch != Prefetch::Off;
        let (blocks, tiers) = (config.blocks.clone(), config.tiers.len());
        let brain = Brain::new(config)?;
        let mut rng = Rng::new(seed);
        let disk_count = disks.len();
        let actors: Vec<Actor> = programs.into_iter().map(|p| Actor::new(p, rng.bits())).collect();
        let mut world = Self {
            brain,
            words: vec![vec![0; blocks.len()]; tiers],
            blocks,
            now: 0,
            order: 0,
            heap: BinaryHeap::new(),
            mail: VecDeque::new(),
            held_back: VecDeque::new(),
            wires: disks.into_iter().chain(uploads).map(Wire::new).collect(),
            disks: disk_count,
            waits: Vec::new(),
            free_waits: Vec::new(),
            waiting: Vec::new(),
            actors,
            registered: vec![None; schedules.len()],
            schedules,
            late: Vec::new(),
            faults,
            rng,
            checker,
            broken: None,
            lazy: setup.lazy,
            prefetches,
            has_parent,
            events: 0,
            events_max: setup.events_max,
            hash: 0xcbf2_9ce4_8422_2325,
            marks: Vec::new(),
            log: None,
            spare: Vec::new(),
            uses: None,
        };
        for index in 0..world.actors.len() {
            let at = world.actors[index].program.begins_at;
            world.wake_at(at, Wake::Actor(index as u32, 0));
        }
        for index in 0..world.faults.budgets.len() {
            world.wake_at(world.faults.budgets[index].at, Wake::Budget(index as u32));
        }
        for index in 0..world.faults.stops.len() {
            world.wake_at(world.faults.stops[index].at, Wake::Stop(index as u32));
        }
        Ok(world)
    }

    /// Keeps a line for each event and command from now on.
    pub fn keep_log(&mut self) {
        self.log = Some(Vec::new());
    }

    /// Keeps, or doesn't, every use of a block from now on.
    pub fn record_uses(&mut self, keep: bool) {
        self.uses = keep.then(Vec::new);
    }

    /// The uses kept so far, in order.
    #[must_use]
    pub fn uses(&self) -> &[(TierId, BlockId)] {
        self.uses.as_deref().unwrap_or_default()
    }

    /// Why a schedule was refused, if one was.
    #[must_use]
    pub fn refused_schedule(&self) -> Option<TooSmall> {
        self.registered.iter().flatten().find_map(|r| r.as_ref().err().cloned())
    }

    /// The lines kept so far.
    #[must_use]
    pub fn log(&self) -> &[String] {
        self.log.as_deref().unwrap_or_default()
    }

    /// The brain, to be looked at.
    #[must_use]
    pub fn brain(&self) -> &Brain {
        &self.brain
    }

    /// Events told and commands carried out so far.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.events
    }

    /// What has come of the run so far.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            events: self.events,
            ended_at: self.now,
            trace_hash: self.hash,
            figures: self.actors.iter().map(|a| a.figures.clone()).collect(),
        }
    }

    /// Runs until nothing moves any more.
    ///
    /// # Errors
    /// The first broken invariant.
    pub fn run(&mut self) -> Result<Summary, Violation> {
        while self.step()? {}
        Ok(self.summary())
    }

    /// Runs until a program has completed so many passes in all, or nothing moves any more.
    ///
    /// # Errors
    /// The first broken invariant.
    pub fn run_to_marks(&mut self, marks: usize) -> Result<(), Violation> {
        while self.marks.len() < marks && self.step()? {}
        Ok(())
    }

    /// Lets one thing happen. False if nothing moves any more.
    ///
    /// # Errors
    /// The first broken invariant.
    pub fn step(&mut self) -> Result<bool, Violation> {
        let more = self.advance();
        if let (None, Some(checker)) = (&self.broken, &mut self.checker) {
            let checked = checker.after_event(&self.brain).and_then(|()| {
                let waiting = self.waiting.iter().map(|&w| &self.waits[w].on);
                let pins = |tier: TierId, block: BlockId| word::pins(self.words[tier.index()][block.index()]);
                if !self.mail.is_empty() {
                    return Ok(());
                }
                checker.starved(&self.brain, pins, waiting)?;
                if !self.prefetches || !self.waiting.is_empty() || !self.held_back.is_empty() {
                    return Ok(());
                }
                let [future, guessed] = crate::actor::future(&self.actors, &self.schedules, &self.has_parent);
                let used = crate::actor::used(&self.schedules, &self.registered, self.blocks.len());
                checker.idle(&self.brain, pins, |wire| self.wires[wire].is_idle(), &future, &guessed, &used)
            });
            let checked = checked.and_then(|()| if more { Ok(()) } else { checker.at_rest(&self.brain) });
            self.broken = checked.err();
        }
        if self.broken.is_none() && !more && !self.waiting.is_empty() {
            self.broken = Some(format!("nothing moves, but {} demands wait", self.waiting.len()));
        }
        if self.broken.is_none() && self.events > self.events_max {
            self.broken = Some("this never ends".into());
        }
        match self.broken.take() {
            Some(what) => Err(Violation { event: self.events, at_ns: self.now, what }),
            None => Ok(more),
        }
    }

    fn advance(&mut self) -> bool {
        let next = self.heap.peek().map(|Reverse((at, ..))| *at);
        if let Some(&(at, _)) = self.mail.front()
            && next.is_none_or(|next| at <= next)
        {
            self.now = self.now.max(at);
            if let Some((_, mail)) = self.mail.pop_front() {
                self.deliver(mail);
            }
            return true;
        }
        if !self.waiting.is_empty()
            && let Some(due) = self.brain.next_deadline()
            && next.is_none_or(|next| due <= next)
        {
            self.now = self.now.max(due);
            self.tell(Event::Tick);
            if self.brain.next_deadline().is_some_and(|d| d <= due) {
                self.broken = Some(format!("a deadline at {due} was not heeded"));
            }
            return true;
        }
        let Some(Reverse((at, _, wake))) = self.heap.pop() else { return false };
        self.now = at;
        self.events += 1;
        match wake {
            Wake::Wire(wire) => self.wire_done(wire as usize),
            Wake::Actor(actor, epoch) => self.act(actor as usize, epoch),
            Wake::Release(index) => {
                if let Some((tier, held)) = self.late[index as usize].take() {
                    self.unpin_all(tier, &held);
                }
            }
            Wake::Patience(actor, ticket) => self.lose_patience(actor as usize, ticket),
            Wake::Budget(index) => {
                let change = self.faults.budgets[index as usize];
                self.send(Mail::Budget { tier: change.tier, bytes: change.bytes });
            }
            Wake::Stop(index) => self.stop(self.faults.stops[index as usize].actor),
        }
        true
    }

    pub(crate) fn wake_at(&mut self, at: Nanos, wake: Wake) {
        self.order += 1;
        self.heap.push(Reverse((at, self.order, wake)));
    }

    pub(crate) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(format!("{:>12} {}", self.now, line()));
        }
    }

    pub(crate) fn check(&mut self, checked: Result<(), String>) {
        if let (None, Err(what)) = (&self.broken, checked) {
            self.broken = Some(what);
        }
    }

    pub(crate) fn with_checker(&mut self, check: impl FnOnce(&mut Checker, &Brain) -> Result<(), String>) {
        if let Some(checker) = &mut self.checker {
            let checked = check(checker, &self.brain);
            self.check(checked);
        }
    }

    /// Sends the brain a message, which may take a while.
    pub(crate) fn send(&mut self, mail: Mail) {
        let step = matches!(mail, Mail::Entered { .. } | Mail::StepTouched { .. } | Mail::Touched { .. });
        if self.lazy && step && self.mail.is_empty() && self.brain.is_quiet() {
            self.held_back.push_back(mail);
            return;
        }
        while let Some(earlier) = self.held_back.pop_front() {
            self.post(earlier);
        }
        self.post(mail);
    }

    fn post(&mut self, mail: Mail) {
        let late = if self.faults.late_ns_max > 0 { self.rng.below(self.faults.late_ns_max) } else { 0 };
        let at = self.mail.back().map_or(0, |(at, _)| *at).max(self.now + late);
        self.mail.push_back((at, mail));
    }

    fn deliver(&mut self, mail: Mail) {
        self.note(|| format!("told {mail:?}"));
        match mail {
            Mail::Entered { sequence, step } => self.tell(Event::StepEntered { sequence, step }),
            Mail::StepTouched { sequence, step } => self.tell(Event::StepTouched { sequence, step }),
            Mail::Touched { tier, blocks } => {
                self.tell(Event::Touched { tier, blocks: &blocks });
                self.recycle(blocks);
            }
            Mail::Expected { sequence, step, blocks, probability_milli } => {
                self.tell(Event::Expected { sequence, step, blocks: &blocks, probability_milli });
                self.recycle(blocks);
            }
            Mail::Demand(ticket) => self.deliver_demand(ticket),
            Mail::Withdrawn(ticket) => {
                self.tell(Event::Withdrawn { ticket });
                if let Some(index) = self.wait_of(ticket) {
                    self.end_wait(index);
                    self.free_wait(index);
                }
            }
            Mail::Done(transfer) => self.tell(Event::TransferDone { transfer }),
            Mail::Failed { transfer, cancelled } => self.tell(Event::TransferFailed { transfer, cancelled }),
            Mail::LastPin { tier, block } => self.tell(Event::LastPinDropped { tier, block }),
            Mail::Budget { tier, bytes } => {
                self.with_checker(|checker, _| {
                    checker.budget(tier, bytes);
                    Ok(())
                });
                self.tell(Event::BudgetChanged { tier, bytes });
            }
            Mail::Close(sequence) => {
                self.events += 1;
                self.brain.close_sequence(sequence);
                self.drain();
            }
        }
    }

    fn deliver_demand(&mut self, ticket: Ticket) {
        let Some(index) = self.wait_of(ticket) else { return };
        self.waiting.push(index);
        let Wait { deadline, on, .. } = &mut self.waits[index];
        let (deadline, tier, blocks) = (*deadline, on.tier, std::mem::take(&mut on.blocks));
        self.events += 1;
        self.brain.handle(Event::Demand { ticket, tier, blocks: &blocks, deadline }, self.now);
        self.waits[index].on.blocks = blocks;
        self.drain();
    }

    fn tell(&mut self, event: Event<'_>) {
        self.events += 1;
        self.brain.handle(event, self.now);
        self.drain();
    }

    /// Carries out what the brain wants.
    pub(crate) fn drain(&mut self) {
        while let Some(command) = self.brain.poll() {
            self.events += 1;
            self.note(|| format!("  does {command:?}"));
            if self.checker.is_some() {
                self.hash_command(&command);
            }
            match command {
                Command::Read { transfer, block, tier, slot, speculative } => {
                    let BlockSize { bytes, wire, .. } = self.blocks[block.index()];
                    let request = Request { transfer, block, tier, slot, from: None, bytes, speculative };
                    self.submit(wire as usize, request);
                }
                Command::Upload { transfer, block, from, from_slot, to, to_slot } => {
                    let bytes = self.blocks[block.index()].bytes;
                    let from = Some(Source { tier: from, slot: from_slot });
                    let request = Request { transfer, block, tier: to, slot: to_slot, from, bytes, speculative: false };
                    self.submit(self.disks + to.index(), request);
                }
                Command::Retire { tier, block } => self.retire(tier, block),
                Command::Cancel { transfer } => self.cancel(transfer),
                Command::Grant { ticket } => self.granted(ticket),
                Command::Fail { ticket, reason } => self.refused(ticket, reason),
                Command::ReleaseSlab { tier, slab } => {
                    self.with_checker(|checker, brain| checker.released(brain, tier, slab));
                }
                other => self.check(Err(format!("no body knows {other:?}"))),
            }
        }
    }

    fn hash_command(&mut self, command: &Command) {
        let mut add = |value: u64| self.hash = (self.hash ^ value).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
        match *command {
            Command::Read { transfer, block, tier, slot, speculative } => {
                add(1 + u64::from(speculative));
                [transfer.0, u64::from(block.0), u64::from(tier.0), u64::from(slot.0)].into_iter().for_each(add);
            }
            Command::Upload { transfer, block, from_slot, to, to_slot, .. } => {
                add(3);
                [transfer.0, u64::from(block.0), u64::from(from_slot.0), u64::from(to.0), u64::from(to_slot.0)]
                    .into_iter()
                    .for_each(add);
            }
            Command::Retire { tier, block } => add(4 | u64::from(tier.0) << 8 | u64::from(block.0) << 16),
            Command::Cancel { transfer } => add(5 ^ transfer.0 << 8),
            Command::Grant { ticket } => add(6 ^ ticket.0 << 8),
            Command::Fail { ticket, .. } => add(7 ^ ticket.0 << 8),
            Command::ReleaseSlab { tier, slab } => add(8 | u64::from(tier.0) << 8 | u64::from(slab) << 16),
            _ => add(9),
        }
    }

    fn submit(&mut self, wire: usize, request: Request) {
        self.with_checker(|checker, _| checker.begin(&request));
        self.wires[wire].submit(request);
        self.feed(wire);
    }

    fn feed(&mut self, wire: usize) {
        while self.wires[wire].can_begin() {
            let Some(request) = self.wires[wire].peek() else { return };
            let luck = self.faults.luck(&mut self.rng, wire, request, self.now);
            if self.wires[wire].begin(self.now, luck)
                && let Some(at) = self.wires[wire].next_done()
            {
                self.wake_at(at, Wake::Wire(wire as u32));
            }
        }
    }

    fn wire_done(&mut self, wire: usize) {
        // A later request may have overtaken the one that this wake-up was for.
        if self.wires[wire].next_done().is_none_or(|at| at > self.now) {
            return;
        }
        let Some(flying) = self.wires[wire].finish() else { return };
        if let Some(at) = self.wires[wire].next_done() {
            self.wake_at(at, Wake::Wire(wire as u32));
        }
        let request = flying.request;
        if flying.fails {
            self.with_checker(|checker, _| checker.failed(&request, false));
            self.send(Mail::Failed { transfer: request.transfer, cancelled: false });
        } else {
            self.with_checker(|checker, _| checker.done(&request));
            let word = &mut self.words[request.tier.index()][request.block.index()];
            match word::publish(*word) {
                Ok(published) => *word = published,
                Err(e) => self.check(Err(format!("block {} arrives in tier {}: {e}", request.block, request.tier))),
            }
            self.send(Mail::Done(request.transfer));
        }
        self.feed(wire);
    }

    fn cancel(&mut self, transfer: TransferId) {
        self.with_checker(|checker, _| checker.unwanted(transfer));
        let dropped = self.wires.iter_mut().find_map(|wire| wire.cancel(transfer));
        if let Some(request) = dropped {
            self.with_checker(|checker, _| checker.failed(&request, true));
            self.send(Mail::Failed { transfer, cancelled: true });
        }
    }

    fn retire(&mut self, tier: TierId, block: BlockId) {
        let word = &mut self.words[tier.index()][block.index()];
        match word::retire(*word) {
            Ok(Retire::Done(retired)) => {
                *word = retired;
                self.with_checker(|checker, _| checker.retired(tier, block));
                self.brain.handle(Event::Retired { tier, block }, self.now);
            }
            Ok(Retire::Refused(refused)) => {
                *word = refused;
                self.brain.handle(Event::RetireRefused { tier, block }, self.now);
            }
            Err(e) => self.check(Err(format!("block {block} is to be retired from tier {tier}: {e}"))),
        }
        self.events += 1;
    }

    fn granted(&mut self, ticket: Ticket) {
        let Some(index) = self.wait_of(ticket) else {
            self.check(Err(format!("demand {ticket} is granted, but nobody made it")));
            return;
        };
        self.end_wait(index);
        if self.waits[index].withdrawn {
            return;
        }
        let Wait { actor, on, .. } = &mut self.waits[index];
        let (actor, tier, blocks) = (*actor, on.tier, std::mem::take(&mut on.blocks));
        for &block in &blocks {
            let pinned = self.pin(tier, block);
            match pinned {
                Ok(held) => self.actors[actor].held.push(held),
                Err(e) => self.check(Err(format!("demand {ticket} is granted without block {block}: {e}"))),
            }
            self.with_checker(|checker, _| checker.leased(tier, block));
        }
        self.waits[index].on.blocks = blocks;
        self.free_wait(index);
        self.answered(actor, None);
    }

    fn refused(&mut self, ticket: Ticket, reason: Refusal) {
        let Some(index) = self.wait_of(ticket) else {
            self.check(Err(format!("demand {ticket} fails, but nobody made it")));
            return;
        };
        let (tier, blocks) = (self.waits[index].on.tier, self.waits[index].on.blocks.clone());
        self.with_checker(|checker, _| match reason {
            Refusal::Transfer { block, tier } => checker.refused_transfer(tier, block),
            Refusal::TooSmall { .. } => checker.refused_size(tier, &blocks),
            _ => Ok(()),
        });
        if reason == Refusal::PinnedOut && self.waits[index].deadline > self.now {
            self.check(Err(format!("demand {ticket} is pinned out before its deadline")));
        }
        self.end_wait(index);
        if !self.waits[index].withdrawn {
            let actor = self.waits[index].actor;
            self.free_wait(index);
            self.answered(actor, Some(reason));
        }
    }

    pub(crate) fn new_wait(&mut self, actor: usize, tier: TierId, blocks: &[BlockId], deadline: Nanos) -> Ticket {
        let index = self.free_waits.pop().unwrap_or_else(|| {
            self.waits.push(Wait {
                generation: 0,
                actor,
                deadline,
                on: Waiting { tier, blocks: Vec::new() },
                withdrawn: false,
                ended: false,
            });
            self.waits.len() - 1
        });
        let wait = &mut self.waits[index];
        (wait.actor, wait.deadline, wait.on.tier) = (actor, deadline, tier);
        (wait.withdrawn, wait.ended) = (false, false);
        wait.on.blocks.clear();
        wait.on.blocks.extend_from_slice(blocks);
        Ticket(u64::from(wait.generation) << 32 | index as u64)
    }

    /// The wait of a ticket, unless it is over.
    pub(crate) fn wait_of(&self, ticket: Ticket) -> Option<usize> {
        let index = (ticket.0 & 0xffff_ffff) as usize;
        let wait = self.waits.get(index)?;
        (u64::from(wait.generation) == ticket.0 >> 32).then_some(index)
    }

    fn end_wait(&mut self, index: usize) {
        self.waits[index].ended = true;
        self.waiting.retain(|&w| w != index);
    }

    fn free_wait(&mut self, index: usize) {
        self.waits[index].generation += 1;
        self.free_waits.push(index);
    }

    pub(crate) fn withdraw(&mut self, ticket: Ticket) {
        if let Some(index) = self.wait_of(ticket) {
            self.waits[index].withdrawn = true;
            self.send(Mail::Withdrawn(ticket));
        }
    }

    pub(crate) fn recycle(&mut self, mut blocks: Vec<BlockId>) {
        blocks.clear();
        self.spare.push(blocks);
    }

    pub(crate) fn mark(&mut self, actor: usize, schedule: usize) {
        self.marks.push(Mark {
            actor,
            schedule,
            at: self.now,
            figures: self.actors[actor].figures.clone(),
            uses: self.uses().len(),
            wire_bytes: self.wires.iter().map(|w| w.bytes_done).collect(),
            wire_busy_ns: self.wires.iter().map(|w| w.busy_ns).collect(),
        });
    }

    /// Whether a wire has nothing to do. Disks first, then tiers' uploads.
    #[must_use]
    pub fn wire_is_idle(&self, wire: usize) -> bool {
        self.wires[wire].is_idle()
    }
}
