//! Invariant 8, the brain's part: once it is warm, the events of a known cycle allocate nothing. Counted by the
//! allocator, in a body that leases through words, completes transfers in order, and drops leases one step late.
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill_core::word::{self, Retire};
use overspill_core::{
    BlockId, BlockSize, Brain, Command, Config, Event, Evict, Prefetch, Schedule, ScheduleId, SequenceId, Step, StepId,
    Ticket, TierConfig, TierId, TransferId,
};
use std::collections::VecDeque;

mod sys {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    thread_local! {
        /// Allocations of this thread so far, those that only grow something included.
        static COUNT: Cell<u64> = const { Cell::new(0) };
    }

    pub fn allocations() -> u64 {
        COUNT.with(Cell::get)
    }

    pub struct Counting;

    // SAFETY: every call is passed on to the system's allocator unchanged; the counter is plain data of the thread, made
    // without allocating. `realloc` and `alloc_zeroed` are left to their defaults, which come through `alloc`.
    unsafe impl GlobalAlloc for Counting {
        // SAFETY: the caller's promise about the layout is the system allocator's requirement.
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            COUNT.with(|count| count.set(count.get() + 1));
            // SAFETY: as above.
            unsafe { System.alloc(layout) }
        }

        // SAFETY: the caller's promise about the pointer is the system allocator's requirement.
        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            // SAFETY: as above.
            unsafe { System.dealloc(pointer, layout) }
        }
    }
}

#[global_allocator]
static ALLOCATOR: sys::Counting = sys::Counting;

const SLOT: u64 = 1 << 20;
const LAYERS: u32 = 24;
const EXPERTS: u32 = 8;
const PICK: usize = 2;
/// Uneven on purpose: sets of different lengths take turns with the same buffers.
const DENSE: [u32; 3] = [1, 4, 9];

/// What a sequence holds.
#[derive(Default)]
struct Runner {
    sequence: Option<SequenceId>,
    set: Vec<BlockId>,
    held: Vec<BlockId>,
    chosen: Vec<BlockId>,
    wanted: Vec<BlockId>,
}

struct Body {
    brain: Brain,
    /// By tier, by block.
    words: Vec<Vec<u64>>,
    flying: VecDeque<(TransferId, TierId, BlockId)>,
    /// Who waits to lease what; nobody once that is leased.
    waiting: Option<(Ticket, Vec<BlockId>)>,
    ticket: u64,
    now: u64,
    chance: u32,
    leased: Vec<BlockId>,
    demands: u64,
    refusals: u64,
    cancels: u64,
}

impl Body {
    fn new(config: Config) -> Self {
        let words = vec![vec![0; config.blocks.len()]; config.tiers.len()];
        let flying = VecDeque::with_capacity(config.blocks.len());
        let brain = Brain::new(config).unwrap();
        Self {
            brain,
            words,
            flying,
            waiting: None,
            ticket: 0,
            now: 0,
            chance: 1,
            leased: Vec::new(),
            demands: 0,
            refusals: 0,
            cancels: 0,
        }
    }

    fn tell(&mut self, event: Event<'_>) {
        self.now += 1000;
        self.brain.handle(event, self.now);
        while let Some(command) = self.brain.poll() {
            match command {
                Command::Read { transfer, block, tier, .. } => self.flying.push_back((transfer, tier, block)),
                Command::Upload { transfer, block, to, .. } => self.flying.push_back((transfer, to, block)),
                Command::Retire { tier, block } => self.retire(tier, block),
                Command::Grant { ticket } => {
                    // Pinned before the next command, which may be to retire one of them.
                    if let Some((_, set)) = self.waiting.take_if(|(waiting, _)| *waiting == ticket) {
                        self.pin(&set);
                        self.leased = set;
                    }
                }
                Command::Cancel { transfer } => {
                    self.cancels += 1;
                    if let Some(at) = self.flying.iter().position(|f| f.0 == transfer) {
                        self.flying.remove(at);
                        self.brain.handle(Event::TransferFailed { transfer, cancelled: true }, self.now);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn retire(&mut self, tier: TierId, block: BlockId) {
        let word = &mut self.words[tier.index()][block.index()];
        match word::retire(*word).unwrap() {
            Retire::Done(retired) => {
                *word = retired;
                self.brain.handle(Event::Retired { tier, block }, self.now);
            }
            Retire::Refused(refused) => {
                *word = refused;
                self.refusals += 1;
                self.brain.handle(Event::RetireRefused { tier, block }, self.now);
            }
        }
    }

    fn land(&mut self) -> bool {
        let Some((transfer, tier, block)) = self.flying.pop_front() else { return false };
        let word = &mut self.words[tier.index()][block.index()];
        *word = word::publish(*word).unwrap();
        self.tell(Event::TransferDone { transfer });
        true
    }

    fn unpin(&mut self, held: &mut Vec<BlockId>) {
        for block in held.drain(..) {
            let word = &mut self.words[0][block.index()];
            let (unpinned, last) = word::unpin(*word).unwrap();
            *word = unpinned;
            if last {
                self.tell(Event::LastPinDropped { tier: TierId(0), block });
            }
        }
    }

    fn pin(&mut self, set: &[BlockId]) {
        for &block in set {
            let word = &mut self.words[0][block.index()];
            *word = word::pin(*word).unwrap();
        }
    }

    fn demand(&mut self, ticket: Ticket, blocks: &[BlockId]) {
        self.demands += 1;
        self.tell(Event::Demand { ticket, tier: TierId(0), blocks, deadline: u64::MAX });
    }

    fn next_ticket(&mut self) -> Ticket {
        self.ticket += 1;
        Ticket(self.ticket)
    }

    /// Leases a set, and only then lets go of the one before, as a GPU does.
    fn lease(&mut self, runner: &mut Runner) {
        let mut set = std::mem::take(&mut runner.set);
        if set.iter().all(|&b| self.brain.is_resident(TierId(0), b)) {
            self.pin(&set);
        } else {
            let ticket = self.next_ticket();
            runner.wanted.clone_from(&set);
            self.waiting = Some((ticket, set));
            self.demand(ticket, &runner.wanted);
            while self.waiting.is_some() {
                if !self.land() {
                    // Nothing moves: what is held must go first.
                    assert!(!runner.held.is_empty(), "a demand that nothing will meet");
                    self.unpin(&mut runner.held);
                }
            }
            set = std::mem::take(&mut self.leased);
        }
        self.unpin(&mut runner.held);
        std::mem::swap(&mut runner.held, &mut set);
        set.clear();
        runner.set = set;
        // The wires go on while it computes.
        self.land();
    }

    /// Experts by chance, never the same twice in one choice.
    fn choose(&mut self, candidates: &[BlockId], chosen: &mut Vec<BlockId>) {
        chosen.clear();
        while chosen.len() < PICK {
            self.chance = self.chance.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let expert = candidates[(self.chance >> 16) as usize % candidates.len()];
            if !chosen.contains(&expert) {
                chosen.push(expert);
            }
        }
    }

    fn step(&mut self, schedule: &Schedule, at: usize, runner: &mut Runner) {
        let (sequence, step) = (runner.sequence.unwrap(), StepId(at as u32));
        let choice = schedule.steps[at].choice_max > 0;
        runner.set.clear();
        if choice {
            runner.set.extend_from_slice(&runner.chosen);
        } else {
            runner.set.extend_from_slice(&schedule.steps[at].blocks);
        }
        self.tell(Event::StepEntered { sequence, step });
        if let Some(next) = schedule.steps.get(at + 1).filter(|s| s.choice_max > 0) {
            let mut chosen = std::mem::take(&mut runner.chosen);
            self.choose(&next.blocks, &mut chosen);
            let step = StepId(at as u32 + 1);
            // Half of the guess is right.
            let guess = [chosen[0], next.blocks[self.chance as usize % next.blocks.len()]];
            let blocks = if guess[0] == guess[1] { &guess[..1] } else { &guess };
            self.tell(Event::Expected { sequence, step, blocks, probability_milli: 800 });
            runner.chosen = chosen;
        }
        self.lease(runner);
        if choice {
            self.tell(Event::Touched { tier: TierId(0), blocks: &runner.held });
        }
        self.tell(Event::StepTouched { sequence, step });
    }
}

fn tier(label: &str, slots: u64, parent: Option<u32>) -> TierConfig {
    let parent = parent.map(TierId);
    TierConfig { label: label.into(), budget_bytes: slots * SLOT, slots_per_slab: 16, parent }
}

fn schedule(mixture: bool) -> (Schedule, u32) {
    let (mut schedule, mut next) = (Schedule { cyclic: true, ..Schedule::default() }, 0);
    let mut push = |count: u32, choice_max: u32| {
        let blocks = (next..next + count).map(BlockId).collect();
        next += count;
        schedule.steps.push(Step { tier: TierId(0), blocks, choice_max });
    };
    for _ in 0..LAYERS {
        DENSE.iter().for_each(|&count| push(count, 0));
        if mixture {
            push(EXPERTS, PICK as u32);
        }
    }
    (schedule, next)
}

fn config(blocks: u32, tiers: Vec<TierConfig>, evict: Evict, prefetch: Prefetch) -> Config {
    Config {
        slot_bytes: SLOT,
        tiers,
        blocks: (0..blocks).map(|b| BlockSize { bytes: SLOT - u64::from(b % 3), slots: 1, wire: b % 2 }).collect(),
        evict,
        prefetch,
        window_bytes: 8 * SLOT,
    }
}

/// Allocations in the second half of so many cycles.
fn count(cycles: usize, mut cycle: impl FnMut()) -> (u64, u64) {
    let start = sys::allocations();
    (0..cycles / 2).for_each(|_| cycle());
    let warm = sys::allocations();
    (0..cycles / 2).for_each(|_| cycle());
    (warm - start, sys::allocations() - warm)
}

fn tiers(blocks: u32, gpu: bool) -> Vec<TierConfig> {
    let part = |percent: u64| u64::from(blocks) * percent / 100;
    if gpu {
        vec![tier("gpu", part(30), Some(1)), tier("host", part(40), None)]
    } else {
        vec![tier("host", part(45), None)]
    }
}

fn all(mut case: impl FnMut(bool, Evict, Prefetch, &str)) {
    for gpu in [false, true] {
        for evict in [Evict::Lru, Evict::NextUse, Evict::Planned, Evict::Auto] {
            for prefetch in [Prefetch::Auto, Prefetch::Off] {
                case(gpu, evict, prefetch, &format!("gpu {gpu}, {evict:?}, prefetch {prefetch:?}"));
            }
        }
    }
}

fn registered(mixture: bool, gpu: bool, evict: Evict, prefetch: Prefetch) -> (Body, Schedule, ScheduleId) {
    let (schedule, blocks) = schedule(mixture);
    let mut body = Body::new(config(blocks, tiers(blocks, gpu), evict, prefetch));
    let id = body.brain.add_schedule(&schedule).unwrap();
    (body, schedule, id)
}

/// Invariant 8: a dense decode, one sequence.
#[test]
fn events_of_a_known_cycle_allocate_nothing() {
    let mut refusals = 0;
    all(|gpu, evict, prefetch, what| {
        let (mut body, schedule, id) = registered(false, gpu, evict, prefetch);
        let mut runner = Runner { sequence: body.brain.open_sequence(id), ..Runner::default() };
        let (warm_up, steady) = count(8, || {
            (0..schedule.steps.len()).for_each(|at| body.step(&schedule, at, &mut runner));
        });
        assert!(warm_up > 0 && body.demands > 0, "{what}: nothing happened");
        assert_eq!(steady, 0, "{what}");
        refusals += body.refusals;
    });
    assert!(refusals > 0, "no lease was ever in the way");
}

/// Invariant 8: a mixture whose choices fall by chance and are half foreseen, two requests at once, one of which
/// sometimes withdraws what it waits for.
#[test]
fn choices_guesses_and_withdrawals_allocate_nothing() {
    let mut cancels = 0;
    all(|gpu, evict, prefetch, what| {
        let (mut body, schedule, id) = registered(true, gpu, evict, prefetch);
        let mut runners = [0, 1].map(|_| Runner { sequence: body.brain.open_sequence(id), ..Runner::default() });
        let steps = schedule.steps.len();
        let (warm_up, steady) = count(40, || {
            for at in 0..steps {
                body.step(&schedule, at, &mut runners[0]);
                body.step(&schedule, (at + steps / 2) % steps, &mut runners[1]);
                let far = &schedule.steps[(at + steps / 4) % steps];
                if at % 7 == 0 && far.choice_max == 0 {
                    let ticket = body.next_ticket();
                    body.demand(ticket, &far.blocks);
                    body.tell(Event::Withdrawn { ticket });
                }
            }
        });
        assert!(warm_up > 0 && body.demands > 0, "{what}: nothing happened");
        assert_eq!(steady, 0, "{what}");
        cancels += body.cancels;
    });
    assert!(cancels > 0, "nothing was ever dropped");
}

/// Invariant 8: a cycle that nobody declared, once it is learned.
#[test]
fn events_of_a_learned_cycle_allocate_nothing() {
    all(|gpu, evict, prefetch, what| {
        let (schedule, blocks) = schedule(false);
        let mut body = Body::new(config(blocks, tiers(blocks, gpu), evict, prefetch));
        let mut runner = Runner::default();
        let (warm_up, steady) = count(12, || {
            for step in &schedule.steps {
                runner.set.extend_from_slice(&step.blocks);
                body.lease(&mut runner);
                body.tell(Event::Touched { tier: TierId(0), blocks: &runner.held });
            }
        });
        assert!(warm_up > 0 && body.demands > 0, "{what}: nothing happened");
        assert!(evict != Evict::Auto || body.brain.decision().why.contains("learned"), "{what}: nothing was learned");
        assert_eq!(steady, 0, "{what}");
    });
}
