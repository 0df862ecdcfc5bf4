//! What the brain does with single events: cases that a world of chance would rarely meet, or not notice.
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill_core::{
    BlockId, BlockSize, Brain, Command, Config, Event, Evict, Prefetch, Schedule, ScheduleId, SequenceId, Step, StepId,
    Ticket, TierConfig, TierId, TransferId,
};

const TIER: TierId = TierId(0);

fn brain(blocks: usize, slots: u64, evict: Evict) -> Brain {
    Brain::new(Config {
        slot_bytes: 1024,
        tiers: vec![TierConfig { label: "host".into(), budget_bytes: slots * 1024, slots_per_slab: 4, parent: None }],
        blocks: vec![BlockSize { bytes: 1024, slots: 1, wire: 0 }; blocks],
        evict,
        prefetch: Prefetch::Auto,
        window_bytes: 16 * 1024,
    })
    .unwrap()
}

fn blocks(range: std::ops::Range<u32>) -> Vec<BlockId> {
    range.map(BlockId).collect()
}

/// A step that chooses, between two that read nothing; a window of one block.
fn mixture(count: usize, slots: u64) -> (Brain, SequenceId) {
    let mut brain = brain(count, slots, Evict::Auto);
    let reads_nothing = Step { tier: TIER, blocks: Vec::new(), choice_max: 0 };
    let chooses = Step { tier: TIER, blocks: blocks(2..34), choice_max: 4 };
    let steps = vec![reads_nothing.clone(), chooses, reads_nothing];
    let schedule = Schedule { label: "mixture".into(), cyclic: true, steps, standing: Vec::new() };
    let id = brain.add_schedule(&schedule).unwrap();
    let sequence = brain.open_sequence(id).unwrap();
    (brain, sequence)
}

/// Tells an event and carries out what comes of it, with a disk that needs no time.
fn tell(brain: &mut Brain, event: Event<'_>) {
    brain.handle(event, 0);
    while let Some(command) = brain.poll() {
        match command {
            Command::Read { transfer, .. } => brain.handle(Event::TransferDone { transfer }, 0),
            Command::Retire { tier, block } => brain.handle(Event::Retired { tier, block }, 0),
            _ => {}
        }
    }
    brain.audit().unwrap();
}

/// A runtime kept expecting a step that it never came to: each guess that was evicted and made again was noted once
/// more, without end. The audit counts the notes against the blocks.
#[test]
fn guesses_that_nobody_settles_do_not_pile_up() {
    let (mut brain, sequence) = mixture(80, 12);
    let (mut evicted, mut guessed) = (0, 0);
    for round in 0..400 {
        let guess = [BlockId(2 + round % 32), BlockId(2 + (round * 7 + 1) % 32)];
        let expected = Event::Expected { sequence, step: StepId(1), blocks: &guess, probability_milli: 900 };
        tell(&mut brain, expected);
        guessed += usize::from(brain.is_resident(TIER, guess[0]));
        // Others take its room.
        let first = 36 + round % 18;
        let others = blocks(first..first + 12);
        let ticket = Ticket(u64::from(round));
        tell(&mut brain, Event::Demand { ticket, tier: TIER, blocks: &others, deadline: 1 });
        evicted = brain.tier_stats(TIER).evictions;
    }
    assert!(evicted > 400, "{evicted}");
    assert!(guessed > 8, "{guessed}");
}

/// A step that was left without a word on what it used (its demand had failed) kept its guesses in the window for
/// ever, and with a window full of them nothing was brought ahead any more.
#[test]
fn a_step_that_is_left_frees_the_window_of_its_guesses() {
    let (mut brain, sequence) = mixture(64, 12);
    for round in 0..8u32 {
        let guess = [BlockId(2 + round)];
        tell(&mut brain, Event::StepEntered { sequence, step: StepId(0) });
        let expected = Event::Expected { sequence, step: StepId(1), blocks: &guess, probability_milli: 900 };
        tell(&mut brain, expected);
        assert!(brain.is_resident(TIER, guess[0]), "round {round}: the window was full");
        tell(&mut brain, Event::StepEntered { sequence, step: StepId(1) });
        tell(&mut brain, Event::StepEntered { sequence, step: StepId(2) });
    }
}

/// Each learned cycle took a new place among the schedules, and forgotten ones kept theirs.
#[test]
fn a_forgotten_cycle_leaves_its_place_to_the_next() {
    let mut brain = brain(64, 32, Evict::Auto);
    for round in 0..20u32 {
        let cycle: Vec<BlockId> =
            (0..16).map(|at| BlockId((round % 2) * 32 + (at * (1 + 2 * (round % 3))) % 16)).collect();
        for _ in 0..8 {
            for &block in &cycle {
                tell(&mut brain, Event::Demand { ticket: Ticket(0), tier: TIER, blocks: &[block], deadline: 1 });
                tell(&mut brain, Event::Touched { tier: TIER, blocks: &[block] });
            }
        }
        assert!(brain.decision().why.contains("learned"), "round {round}: {}", brain.decision().why);
    }
    let steps = vec![Step { tier: TIER, blocks: blocks(0..4), choice_max: 0 }];
    let declared = Schedule { label: "declared".into(), cyclic: true, steps, standing: Vec::new() };
    assert!(brain.add_schedule(&declared).unwrap() <= ScheduleId(1));
    brain.audit().unwrap();
}

/// A read that was to be dropped, and failed, was tried a second time for nobody.
#[test]
fn what_was_to_be_dropped_is_not_tried_again() {
    let mut brain = brain(4, 4, Evict::Auto);
    let only_read = |brain: &mut Brain| -> TransferId {
        let Some(Command::Read { transfer, .. }) = brain.poll() else { panic!("no read") };
        assert_eq!(brain.poll(), None);
        transfer
    };
    let demand = |ticket| Event::Demand { ticket: Ticket(ticket), tier: TIER, blocks: &[BlockId(1)], deadline: 9 };
    brain.handle(demand(1), 0);
    let transfer = only_read(&mut brain);
    brain.handle(Event::Withdrawn { ticket: Ticket(1) }, 0);
    assert_eq!(brain.poll(), Some(Command::Cancel { transfer }));
    brain.handle(Event::TransferFailed { transfer, cancelled: false }, 0);
    assert_eq!(brain.poll(), None);
    // Somebody who came for it in the meantime gets both tries.
    brain.handle(demand(2), 0);
    let transfer = only_read(&mut brain);
    brain.handle(Event::Withdrawn { ticket: Ticket(2) }, 0);
    assert_eq!(brain.poll(), Some(Command::Cancel { transfer }));
    brain.handle(demand(3), 0);
    brain.handle(Event::TransferFailed { transfer, cancelled: true }, 0);
    for _ in 0..2 {
        let transfer = only_read(&mut brain);
        brain.handle(Event::TransferFailed { transfer, cancelled: false }, 0);
    }
    assert!(matches!(brain.poll(), Some(Command::Fail { ticket: Ticket(3), .. })));
    brain.audit().unwrap();
}

/// What was expected while no slot was free made room, and then was not brought: a guess only paid where nothing else
/// was.
#[test]
fn what_is_expected_comes_into_a_full_tier() {
    let (mut brain, sequence) = mixture(64, 12);
    tell(&mut brain, Event::Demand { ticket: Ticket(0), tier: TIER, blocks: &blocks(40..52), deadline: 1 });
    assert_eq!(brain.tier_stats(TIER).free_bytes, 0);
    let guess = blocks(2..4);
    tell(&mut brain, Event::Expected { sequence, step: StepId(1), blocks: &guess, probability_milli: 900 });
    assert!(brain.is_resident(TIER, guess[0]) && !brain.is_resident(TIER, guess[1]), "a window of one block");
    tell(&mut brain, Event::StepEntered { sequence, step: StepId(1) });
    tell(&mut brain, Event::Touched { tier: TIER, blocks: &guess[..1] });
    tell(&mut brain, Event::StepTouched { sequence, step: StepId(1) });
    assert!(!brain.is_resident(TIER, guess[1]), "its step is over");
    assert_eq!(brain.tier_stats(TIER).evictions, 1);
}

/// A runtime that leases what it has chosen in portions says so with certainty: the rest is read right behind the
/// portion that it waits for, as far as the window goes. A mere guess gets a quarter of the window.
#[test]
fn what_is_certain_is_read_behind_what_is_waited_for() {
    for (probability_milli, rest) in [(1000, 2..6), (900, 2..3)] {
        let mut brain = brain(64, 32, Evict::Auto);
        let steps = vec![
            Step { tier: TIER, blocks: Vec::new(), choice_max: 0 },
            Step { tier: TIER, blocks: blocks(0..48), choice_max: 4 },
        ];
        let schedule = Schedule { label: "mixture".into(), cyclic: true, steps, standing: Vec::new() };
        let id = brain.add_schedule(&schedule).unwrap();
        let sequence = brain.open_sequence(id).unwrap();
        let step = StepId(1);
        brain.handle(Event::StepEntered { sequence, step }, 0);
        let chosen = blocks(0..6);
        brain.handle(Event::Demand { ticket: Ticket(1), tier: TIER, blocks: &chosen[..2], deadline: 1 }, 0);
        brain.handle(Event::Expected { sequence, step, blocks: &chosen, probability_milli }, 0);
        let mut reads = Vec::new();
        while let Some(command) = brain.poll() {
            if let Command::Read { block, speculative, .. } = command {
                reads.push((block, speculative));
            }
        }
        let wanted: Vec<_> =
            blocks(0..2).into_iter().map(|b| (b, false)).chain(blocks(rest).into_iter().map(|b| (b, true))).collect();
        assert_eq!(reads, wanted, "{probability_milli}");
        brain.audit().unwrap();
    }
}
