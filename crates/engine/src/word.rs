//! The word of a block, made atomic. The transitions are core's ([`overspill_core::word`]); here they are applied by
//! compare-and-swap. Under `--cfg loom` the same code is checked for every interleaving.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
use overspill_core::word::{self, Retire, WordError};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// The state of one block in one tier.
#[derive(Debug, Default)]
pub(crate) struct Word(AtomicU64);

impl Word {
    fn update<T>(&self, mut step: impl FnMut(u64) -> Result<(u64, T), WordError>) -> Result<T, WordError> {
        let mut current = self.0.load(Ordering::Acquire);
        loop {
            let (next, out) = step(current)?;
            match self.0.compare_exchange_weak(current, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(out),
                Err(changed) => current = changed,
            }
        }
    }

    /// Takes a pin if the block is resident.
    pub(crate) fn pin(&self) -> Result<(), WordError> {
        self.update(|w| Ok((word::pin(w)?, ())))
    }

    /// Drops a pin. True if it was the last and the brain wants to know.
    pub(crate) fn unpin(&self) -> Result<bool, WordError> {
        self.update(word::unpin)
    }

    /// Makes the block resident.
    pub(crate) fn publish(&self) -> Result<(), WordError> {
        self.update(|w| Ok((word::publish(w)?, ())))
    }

    /// Takes the block out of the tier. False if it is pinned; then the last pin will tell.
    pub(crate) fn retire(&self) -> Result<bool, WordError> {
        self.update(|w| {
            Ok(match word::retire(w)? {
                Retire::Done(next) => (next, true),
                Retire::Refused(next) => (next, false),
            })
        })
    }

    /// Whether the block is in the tier.
    pub(crate) fn is_resident(&self) -> bool {
        word::is_resident(self.0.load(Ordering::Acquire))
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU32, Ordering::SeqCst};

    /// Preemptions looked at in one interleaving: without a bound the search does not end within minutes, and few bugs
    /// need more (Musuvathi and Qadeer, PLDI 2007).
    const PREEMPTIONS: usize = 3;

    /// Invariant 3: whatever the interleaving, within that bound, a slot is never free while a pin is held, and a refused retirement is
    /// told of the last pin exactly once.
    #[test]
    fn a_pin_and_a_retirement_never_both_succeed() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(PREEMPTIONS);
        model.check(|| {
            let word = Arc::new(Word::default());
            let (told, held) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
            word.publish().unwrap();
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let (word, told, held) = (word.clone(), told.clone(), held.clone());
                    loom::thread::spawn(move || {
                        if word.pin().is_ok() {
                            held.fetch_add(1, SeqCst);
                            held.fetch_sub(1, SeqCst);
                            if word.unpin().unwrap() {
                                told.fetch_add(1, SeqCst);
                            }
                        }
                    })
                })
                .collect();
            let retired = word.retire().unwrap();
            if retired {
                assert_eq!(held.load(SeqCst), 0);
            }
            threads.into_iter().for_each(|t| t.join().unwrap());
            assert_eq!(told.load(SeqCst), u32::from(!retired));
        });
    }
}
