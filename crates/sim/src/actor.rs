//! How programs run: the fast path, the wait for a grant, the computing, the end of leases.

use crate::program::{Figures, Program, ScheduleModel, Work};
use crate::rng::Rng;
use crate::router::{Habit, Router};
use crate::world::{Mail, Wake, World};
use overspill_core::word::{self, WordError};
use overspill_core::{BlockId, Refusal, ScheduleId, SequenceId, StepId, Ticket, TierId, TooSmall};

/// A pinned block and the generation in which it was pinned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    block: BlockId,
    generation: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Start,
    Waiting(Ticket),
    Answered(Option<Refusal>),
    Computing,
    Done,
}

/// What the current set is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Standing,
    /// What choices may fall on, before the first step.
    Warm,
    Step,
}

/// A program that runs.
#[derive(Clone, Debug)]
pub(crate) struct Actor {
    pub(crate) program: Program,
    pub(crate) figures: Figures,
    pub(crate) held: Vec<Held>,
    phase: Phase,
    part: Part,
    epoch: u32,
    sequence: Option<SequenceId>,
    /// Which of the program's passes or rounds, which pass of it, which step or set of that.
    stage: usize,
    pass: u32,
    step: usize,
    tier: TierId,
    set: Vec<BlockId>,
    /// What the current step has chosen besides, and leases afterwards.
    rest: Vec<BlockId>,
    /// Blocks that the current step chose in all.
    chosen_blocks: usize,
    /// What is still to be gone through before the first step, last first.
    warming: Vec<(TierId, Vec<BlockId>)>,
    standing: Vec<(TierId, Held)>,
    router: Router,
    rng: Rng,
    chosen: Vec<u32>,
    /// Experts that the next choice will choose, if they were foreseen.
    foreseen: Option<Vec<u32>>,
    /// Blocks that it said it expects, at which steps, until these are over.
    guesses: Vec<(usize, TierId, BlockId)>,
    tries: u32,
    since: u64,
}

impl Actor {
    pub(crate) fn new(program: Program, seed: u64) -> Self {
        let habit = match &program.work {
            Work::Sequence { habit, .. } => habit.clone(),
            Work::Acquire { .. } => Habit::Uniform,
        };
        Self {
            program,
            figures: Figures::default(),
            held: Vec::new(),
            phase: Phase::Start,
            part: Part::Standing,
            epoch: 0,
            sequence: None,
            stage: 0,
            pass: 0,
            step: 0,
            tier: TierId(0),
            set: Vec::new(),
            rest: Vec::new(),
            chosen_blocks: 0,
            warming: Vec::new(),
            standing: Vec::new(),
            router: Router::new(habit, seed),
            rng: Rng::new(!seed),
            chosen: Vec::new(),
            foreseen: None,
            guesses: Vec::new(),
            tries: 0,
            since: 0,
        }
    }
}

impl Actor {
    /// What its choices may fall on, in sets that may be leased at once; the likeliest first, since the last is taken
    /// first.
    fn warming_sets(&mut self, model: &ScheduleModel) -> Vec<(TierId, Vec<BlockId>)> {
        let Work::Sequence { warm: true, .. } = self.program.work else { return Vec::new() };
        let choices = model.schedule.steps.iter().zip(&model.choices).filter_map(|(s, c)| c.map(|choice| (s, choice)));
        let mut ranked = Vec::new();
        for (layer, (step, choice)) in choices.enumerate() {
            let share = step.blocks.len() / choice.experts.max(1) as usize;
            let most = if choice.together > 0 { choice.together as usize } else { share }.max(1);
            for (rank, expert) in self.router.ranked(layer, choice.experts).into_iter().enumerate() {
                let blocks = &step.blocks[expert as usize * share..(expert as usize + 1) * share];
                ranked.extend(blocks.chunks(most).map(|set| (rank, step.tier, set.to_vec())));
            }
        }
        ranked.sort_by_key(|(rank, ..)| *rank);
        ranked.into_iter().map(|(_, tier, set)| (tier, set)).collect()
    }
}

/// What sequences will surely use after their current step, and where; and what they said that they expect.
/// `has_parent` says of each tier whether another feeds it.
pub(crate) fn future(
    actors: &[Actor],
    schedules: &[ScheduleModel],
    has_parent: &[bool],
) -> [Vec<(TierId, BlockId)>; 2] {
    let [mut future, mut guessed] = [Vec::new(), Vec::new()];
    for actor in actors.iter().filter(|a| a.sequence.is_some()) {
        let Work::Sequence { passes, .. } = &actor.program.work else { continue };
        let Some(schedule) = passes.get(actor.stage).map(|p| &schedules[p.schedule].schedule) else { continue };
        let steps = schedule.steps.iter().enumerate().filter(|(_, s)| s.choice_max == 0);
        let begun = actor.part == Part::Step;
        let ahead = |at: usize| if begun { at > actor.step || schedule.cyclic && at < actor.step } else { true };
        for (_, step) in steps.filter(|(at, _)| ahead(*at)) {
            future.extend(step.blocks.iter().map(|&block| (step.tier, block)));
        }
        // What feeding tiers have for the current step counts as ahead until it is left, even if its demand failed.
        if let Some(step) = schedule.steps.get(actor.step).filter(|s| s.choice_max == 0) {
            let feeds = has_parent[step.tier.index()];
            guessed.extend(step.blocks.iter().filter(|_| feeds).map(|&block| (step.tier, block)));
        }
        guessed.extend(actor.guesses.iter().map(|&(_, tier, block)| (tier, block)));
    }
    [future, guessed]
}

/// Blocks with a place in a registered schedule's order.
pub(crate) fn used(
    schedules: &[ScheduleModel],
    registered: &[Option<Result<ScheduleId, TooSmall>>],
    blocks: usize,
) -> Vec<bool> {
    let mut used = vec![false; blocks];
    for (model, _) in schedules.iter().zip(registered).filter(|(_, r)| matches!(r, Some(Ok(_)))) {
        let blocks = model.schedule.steps.iter().filter(|s| s.choice_max == 0).flat_map(|s| &s.blocks);
        blocks.chain(&model.schedule.standing).for_each(|b| used[b.index()] = true);
    }
    used
}

impl World {
    fn continue_at(&mut self, index: usize, at: u64, phase: Phase) {
        let actor = &mut self.actors[index];
        actor.phase = phase;
        actor.epoch += 1;
        let epoch = actor.epoch;
        self.wake_at(at, Wake::Actor(index as u32, epoch));
    }

    pub(crate) fn act(&mut self, index: usize, epoch: u32) {
        if self.actors[index].epoch != epoch {
            return;
        }
        match self.actors[index].phase {
            Phase::Start => self.begin_stage(index),
            Phase::Answered(None) => self.compute(index),
            Phase::Answered(Some(reason)) => self.cope(index, reason),
            Phase::Computing => self.end_set(index),
            Phase::Waiting(_) | Phase::Done => {}
        }
    }

    /// Begins the next of a program's schedules.
    fn begin_stage(&mut self, index: usize) {
        let stage = self.actors[index].stage;
        match &self.actors[index].program.work {
            Work::Acquire { rounds, sets, .. } => {
                if stage < *rounds as usize && !sets.is_empty() {
                    self.actors[index].part = Part::Step;
                    self.begin_set(index);
                } else {
                    self.finish(index);
                }
            }
            Work::Sequence { passes, .. } => {
                let Some(schedule) = passes.get(stage).map(|p| p.schedule) else {
                    self.finish(index);
                    return;
                };
                if self.registered[schedule].is_none() {
                    let registered = self.brain.add_schedule(&self.schedules[schedule].schedule);
                    self.registered[schedule] = Some(registered);
                    self.drain();
                }
                let Some(Ok(id)) = self.registered[schedule] else {
                    self.actors[index].figures.too_small += 1;
                    self.actors[index].stage += 1;
                    self.continue_at(index, self.now, Phase::Start);
                    return;
                };
                let sequence = self.brain.open_sequence(id);
                self.note(|| format!("program {index} opens sequence {sequence:?} of schedule {id}"));
                self.drain();
                let model = &self.schedules[schedule];
                let standing = !model.schedule.standing.is_empty();
                let actor = &mut self.actors[index];
                (actor.sequence, actor.pass, actor.step) = (sequence, 0, 0);
                actor.warming = actor.warming_sets(model);
                actor.part = if standing { Part::Standing } else { Part::Warm };
                if actor.part == Part::Warm && actor.warming.is_empty() {
                    actor.part = Part::Step;
                }
                self.begin_set(index);
            }
        }
    }

    fn schedule_of(&self, index: usize) -> Option<usize> {
        match &self.actors[index].program.work {
            Work::Sequence { passes, .. } => passes.get(self.actors[index].stage).map(|p| p.schedule),
            Work::Acquire { .. } => None,
        }
    }

    /// Fills in what the current step needs.
    fn fill_set(&mut self, index: usize) {
        let schedule = self.schedule_of(index);
        let actor = &mut self.actors[index];
        actor.set.clear();
        actor.rest.clear();
        match (&actor.program.work, schedule) {
            (Work::Acquire { tier, sets, .. }, _) => {
                actor.tier = *tier;
                actor.set.extend_from_slice(&sets[actor.step]);
            }
            (Work::Sequence { .. }, Some(schedule)) => {
                let model = &self.schedules[schedule];
                if actor.part == Part::Standing {
                    actor.tier = model.schedule.steps.first().map_or(TierId(0), |s| s.tier);
                    actor.set.extend_from_slice(&model.schedule.standing);
                    return;
                }
                if actor.part == Part::Warm {
                    if let Some((tier, blocks)) = actor.warming.pop() {
                        actor.tier = tier;
                        actor.set.extend_from_slice(&blocks);
                    }
                    return;
                }
                let step = &model.schedule.steps[actor.step];
                actor.tier = step.tier;
                match model.choices.get(actor.step).copied().flatten() {
                    None => actor.set.extend_from_slice(&step.blocks),
                    Some(choice) => {
                        let layer = model.choices[..actor.step].iter().flatten().count();
                        match actor.foreseen.take() {
                            Some(foreseen) => actor.chosen = foreseen,
                            None => actor.router.choose(layer, choice.experts, choice.pick, &mut actor.chosen),
                        }
                        let share = step.blocks.len() / choice.experts.max(1) as usize;
                        for &expert in &actor.chosen {
                            let first = expert as usize * share;
                            actor.set.extend_from_slice(&step.blocks[first..first + share]);
                        }
                        actor.chosen_blocks = actor.set.len();
                        if choice.together > 0 && actor.set.len() > choice.together as usize {
                            actor.rest.extend(actor.set.drain(choice.together as usize..));
                        }
                    }
                }
            }
            (Work::Sequence { .. }, None) => {}
        }
    }

    /// Says what the next step is expected to choose.
    fn foresee(&mut self, index: usize) {
        let Some(schedule) = self.schedule_of(index) else { return };
        let (model, actor) = (&self.schedules[schedule], &mut self.actors[index]);
        let Work::Sequence { foresight_milli, .. } = actor.program.work else { return };
        let next = (actor.step + 1) % model.schedule.steps.len();
        let (Some(choice), Some(sequence)) = (model.choices.get(next).copied().flatten(), actor.sequence) else {
            return;
        };
        if foresight_milli == 0 || actor.foreseen.is_some() || next == actor.step {
            return;
        }
        let layer = model.choices[..next].iter().flatten().count();
        let mut chosen = Vec::new();
        actor.router.choose(layer, choice.experts, choice.pick, &mut chosen);
        let step = &model.schedule.steps[next];
        let share = step.blocks.len() / choice.experts.max(1) as usize;
        let mut guess = self.spare.pop().unwrap_or_default();
        for &expert in &chosen {
            let right = actor.rng.chance(u64::from(foresight_milli));
            let expert = if right { expert as usize } else { actor.rng.below(u64::from(choice.experts)) as usize };
            let blocks = &step.blocks[expert * share..(expert + 1) * share];
            if !blocks.is_empty() && !guess.contains(&blocks[0]) {
                guess.extend_from_slice(blocks);
            }
        }
        actor.foreseen = Some(chosen);
        actor.guesses.extend(guess.iter().map(|&block| (next, step.tier, block)));
        let step = StepId(next as u32);
        self.send(Mail::Expected { sequence, step, blocks: guess, probability_milli: foresight_milli });
    }

    fn begin_set(&mut self, index: usize) {
        self.fill_set(index);
        self.announce(index);
        let actor = &self.actors[index];
        if let (Some(sequence), Part::Step) = (actor.sequence, actor.part) {
            let step = StepId(actor.step as u32);
            self.send(Mail::Entered { sequence, step });
            self.foresee(index);
        }
        self.lease(index);
    }

    /// Says what the current step has chosen, if it leases it in several sets.
    fn announce(&mut self, index: usize) {
        let actor = &mut self.actors[index];
        let Some(sequence) = actor.sequence.filter(|_| !actor.rest.is_empty()) else { return };
        let mut blocks = self.spare.pop().unwrap_or_default();
        blocks.extend(actor.set.iter().chain(&actor.rest));
        let (step, tier) = (actor.step, actor.tier);
        actor.guesses.extend(blocks.iter().map(|&block| (step, tier, block)));
        self.send(Mail::Expected { sequence, step: StepId(step as u32), blocks, probability_milli: 1000 });
    }

    /// The next set of what the current step has chosen; `false` if there is none.
    fn next_of_choice(&mut self, index: usize) -> bool {
        let Some(schedule) = self.schedule_of(index) else { return false };
        let actor = &mut self.actors[index];
        let choice = self.schedules[schedule].choices.get(actor.step).copied().flatten();
        let (Some(choice), Some(sequence)) = (choice.filter(|_| !actor.rest.is_empty()), actor.sequence) else {
            return false;
        };
        let count = actor.rest.len().min(choice.together.max(1) as usize);
        actor.set.clear();
        actor.set.extend(actor.rest.drain(..count));
        let step = StepId(actor.step as u32);
        self.send(Mail::Entered { sequence, step });
        self.lease(index);
        true
    }

    /// The fast path; failing that, a demand.
    fn lease(&mut self, index: usize) {
        let (tier, set) = (self.actors[index].tier, std::mem::take(&mut self.actors[index].set));
        let mut missing = 0;
        let mut held = std::mem::take(&mut self.actors[index].held);
        for &block in &set {
            match self.pin(tier, block) {
                Ok(pin) => held.push(pin),
                Err(_) => missing += 1,
            }
        }
        let first = self.actors[index].tries == 0;
        if first {
            self.actors[index].figures.hits += set.len() as u64 - missing;
            self.actors[index].figures.misses += missing;
        }
        if missing == 0 {
            for at in &held {
                let block = at.block;
                self.with_checker(|checker, _| checker.leased(tier, block));
            }
            self.actors[index].held = held;
            self.actors[index].set = set;
            self.compute(index);
            return;
        }
        self.unpin_all(tier, &held);
        held.clear();
        self.actors[index].held = held;
        let deadline = self.now.saturating_add(self.actors[index].program.deadline_ns);
        let ticket = self.new_wait(index, tier, &set, deadline);
        let actor = &mut self.actors[index];
        (actor.set, actor.phase, actor.since) = (set, Phase::Waiting(ticket), self.now);
        if let Some(patience) = actor.program.patience_ns {
            self.wake_at(self.now + patience, Wake::Patience(index as u32, ticket));
        }
        self.send(Mail::Demand(ticket));
    }

    /// A demand has been granted or refused.
    pub(crate) fn answered(&mut self, index: usize, refusal: Option<Refusal>) {
        let actor = &mut self.actors[index];
        actor.figures.stall_ns += self.now - actor.since;
        match refusal {
            None => actor.figures.granted += 1,
            Some(Refusal::Transfer { .. }) => actor.figures.failed += 1,
            Some(Refusal::TooSmall { .. }) => actor.figures.too_small += 1,
            Some(_) => actor.figures.pinned_out += 1,
        }
        self.continue_at(index, self.now, Phase::Answered(refusal));
    }

    /// Tries once more what leases or a transfer kept from it, then goes on without. What is too large, it leaves.
    fn cope(&mut self, index: usize, reason: Refusal) {
        let actor = &mut self.actors[index];
        actor.tries += 1;
        match reason {
            Refusal::TooSmall { .. } if actor.part == Part::Standing => self.finish(index),
            Refusal::TooSmall { .. } => self.next_set(index),
            _ if actor.tries < 2 => self.lease(index),
            _ => self.next_set(index),
        }
    }

    fn compute(&mut self, index: usize) {
        let schedule = self.schedule_of(index);
        let actor = &mut self.actors[index];
        actor.tries = 0;
        let compute_ns = match (&actor.program.work, schedule, actor.part) {
            (Work::Acquire { compute_ns, .. }, ..) => *compute_ns,
            (_, Some(schedule), Part::Step) => {
                let model = &self.schedules[schedule];
                let whole = model.compute_ns.get(actor.step).copied().unwrap_or_default();
                match model.choices.get(actor.step).copied().flatten() {
                    Some(_) => whole * actor.set.len() as u64 / actor.chosen_blocks.max(1) as u64,
                    None => whole,
                }
            }
            _ => 0,
        };
        if let Some(uses) = &mut self.uses {
            uses.extend(actor.set.iter().map(|&block| (actor.tier, block)));
        }
        actor.figures.compute_ns += compute_ns;
        actor.figures.touched_bytes += actor.set.iter().map(|b| self.blocks[b.index()].bytes).sum::<u64>();
        self.continue_at(index, self.now + compute_ns, Phase::Computing);
    }

    fn end_set(&mut self, index: usize) {
        let tier = self.actors[index].tier;
        if self.actors[index].part == Part::Standing {
            let actor = &mut self.actors[index];
            let held = actor.held.drain(..).map(|h| (tier, h));
            actor.standing.extend(held);
            self.next_set(index);
            return;
        }
        self.drop_held(index);
        let actor = &self.actors[index];
        if actor.part == Part::Warm {
            self.tell_touched(index);
            self.next_set(index);
            return;
        }
        let step = StepId(actor.step as u32);
        let choice = self
            .schedule_of(index)
            .is_some_and(|s| self.schedules[s].choices.get(actor.step).is_some_and(Option::is_some));
        if actor.sequence.is_none() || choice {
            self.tell_touched(index);
        }
        if choice && self.next_of_choice(index) {
            return;
        }
        if let Some(sequence) = self.actors[index].sequence {
            self.send(Mail::StepTouched { sequence, step });
        }
        self.next_set(index);
    }

    fn tell_touched(&mut self, index: usize) {
        let actor = &self.actors[index];
        let mut blocks = self.spare.pop().unwrap_or_default();
        blocks.extend_from_slice(&actor.set);
        self.send(Mail::Touched { tier: actor.tier, blocks });
    }

    fn drop_held(&mut self, index: usize) {
        let actor = &mut self.actors[index];
        let (tier, lag) = (actor.tier, actor.program.lag_ns);
        let mut held = std::mem::take(&mut actor.held);
        if lag > 0 && !held.is_empty() {
            self.late.push(Some((tier, held)));
            self.wake_at(self.now + lag, Wake::Release(self.late.len() as u32 - 1));
            return;
        }
        self.unpin_all(tier, &held);
        held.clear();
        self.actors[index].held = held;
    }

    fn next_set(&mut self, index: usize) {
        let schedule = self.schedule_of(index);
        let actor = &mut self.actors[index];
        actor.tries = 0;
        if actor.part != Part::Step && !actor.warming.is_empty() {
            actor.part = Part::Warm;
            self.begin_set(index);
            return;
        }
        if actor.part != Part::Step {
            actor.part = Part::Step;
            if schedule.is_some_and(|s| !self.schedules[s].schedule.steps.is_empty()) {
                self.begin_set(index);
            } else {
                self.finish(index);
            }
            return;
        }
        let (steps, passes) = match (&actor.program.work, schedule) {
            (Work::Acquire { sets, .. }, _) => (sets.len(), 1),
            (Work::Sequence { passes, .. }, Some(schedule)) => {
                (self.schedules[schedule].schedule.steps.len(), passes[actor.stage].passes)
            }
            _ => (0, 0),
        };
        actor.guesses.retain(|guess| guess.0 != actor.step);
        actor.step += 1;
        if actor.step < steps {
            self.begin_set(index);
            return;
        }
        (actor.step, actor.pass) = (0, actor.pass + 1);
        if let Some(schedule) = schedule {
            self.mark(index, schedule);
        }
        let actor = &mut self.actors[index];
        if actor.pass < passes {
            self.begin_set(index);
            return;
        }
        actor.pass = 0;
        actor.stage += 1;
        self.leave(index);
        // Not at once: a program whose sets all fail must not keep the clock from going on.
        self.continue_at(index, self.now, Phase::Start);
    }

    /// Drops the standing leases and closes the sequence.
    fn leave(&mut self, index: usize) {
        let standing = std::mem::take(&mut self.actors[index].standing);
        for (tier, held) in standing {
            self.unpin_all(tier, &[held]);
        }
        self.actors[index].foreseen = None;
        self.actors[index].guesses.clear();
        if let Some(sequence) = self.actors[index].sequence.take() {
            self.send(Mail::Close(sequence));
        }
    }

    fn finish(&mut self, index: usize) {
        self.leave(index);
        self.actors[index].phase = Phase::Done;
    }

    pub(crate) fn lose_patience(&mut self, index: usize, ticket: Ticket) {
        if self.actors[index].phase != Phase::Waiting(ticket) {
            return;
        }
        self.withdraw(ticket);
        self.actors[index].figures.withdrawn += 1;
        self.actors[index].figures.stall_ns += self.now - self.actors[index].since;
        self.next_set(index);
    }

    /// Ends a program wherever it is.
    pub(crate) fn stop(&mut self, index: usize) {
        match self.actors[index].phase {
            Phase::Done => return,
            Phase::Waiting(ticket) => self.withdraw(ticket),
            _ => self.drop_held(index),
        }
        self.note(|| format!("program {index} is stopped"));
        self.actors[index].epoch += 1;
        self.finish(index);
    }

    pub(crate) fn pin(&mut self, tier: TierId, block: BlockId) -> Result<Held, WordError> {
        let word = &mut self.words[tier.index()][block.index()];
        *word = word::pin(*word)?;
        Ok(Held { block, generation: word::generation(*word) })
    }

    pub(crate) fn unpin_all(&mut self, tier: TierId, held: &[Held]) {
        for &Held { block, generation } in held {
            let word = &mut self.words[tier.index()][block.index()];
            let now = word::generation(*word);
            match word::unpin(*word) {
                Ok((unpinned, last)) => {
                    *word = unpinned;
                    if last {
                        self.send(Mail::LastPin { tier, block });
                    }
                }
                Err(e) => self.check(Err(format!("lease of block {block} in tier {tier}: {e}"))),
            }
            if now != generation {
                self.check(Err(format!("block {block} in tier {tier} moved under a lease")));
            }
            self.with_checker(|checker, _| checker.leased(tier, block));
        }
    }
}
