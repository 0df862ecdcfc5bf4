//! The atomic word of a block in a tier: resident or not, how many leases pin it, and its generation.
//!
//! These are pure functions from word to word. The engine applies them with compare-and-swap, the simulator to plain
//! integers; both therefore obey the same transitions. A resident block is pinned without asking the brain.
//!
//! Layout: bits 0–23 pins, bit 24 resident, bit 25 notify (the brain waits for the last pin to drop), bits 32–63
//! generation (counts how often the block became resident).

/// One count in the field of pins.
const PIN: u64 = 1;
/// The field of pins.
const PINS: u64 = (1 << 24) - 1;
const RESIDENT: u64 = 1 << 24;
const NOTIFY: u64 = 1 << 25;
const GENERATION: u64 = 1 << 32;

/// Why a transition is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WordError {
    /// The block is not in the tier; ask the brain for it.
    #[error("the block is not resident")]
    NotResident,
    /// More than 2²⁴ − 1 leases of one block.
    #[error("too many leases of one block")]
    TooManyPins,
    /// An unpin without a pin: a bug in the body.
    #[error("a pin was dropped that was never taken")]
    NotPinned,
    /// A block became resident twice: a bug in the body.
    #[error("the block is resident already")]
    AlreadyResident,
}

/// What came of an attempt to retire a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retire {
    /// Not resident any more: its slot is free.
    Done(u64),
    /// Pinned. The word now asks whoever drops the last pin to say so.
    Refused(u64),
}

/// Takes a pin.
///
/// # Errors
/// [`WordError::NotResident`], [`WordError::TooManyPins`].
pub const fn pin(word: u64) -> Result<u64, WordError> {
    if word & RESIDENT == 0 {
        return Err(WordError::NotResident);
    }
    if word & PINS == PINS {
        return Err(WordError::TooManyPins);
    }
    Ok(word + PIN)
}

/// Drops a pin. The flag says that it was the last and that the brain wants to know.
///
/// # Errors
/// [`WordError::NotPinned`].
pub const fn unpin(word: u64) -> Result<(u64, bool), WordError> {
    if word & PINS == 0 {
        return Err(WordError::NotPinned);
    }
    let word = word - PIN;
    if word & PINS == 0 && word & NOTIFY != 0 { Ok((word & !NOTIFY, true)) } else { Ok((word, false)) }
}

/// Makes the block resident, in a new generation.
///
/// # Errors
/// [`WordError::AlreadyResident`].
pub const fn publish(word: u64) -> Result<u64, WordError> {
    if word & RESIDENT != 0 {
        return Err(WordError::AlreadyResident);
    }
    Ok((word | RESIDENT).wrapping_add(GENERATION))
}

/// Takes the block out of the tier, unless it is pinned.
///
/// # Errors
/// [`WordError::NotResident`].
pub const fn retire(word: u64) -> Result<Retire, WordError> {
    if word & RESIDENT == 0 {
        return Err(WordError::NotResident);
    }
    if word & PINS == 0 { Ok(Retire::Done(word & !(RESIDENT | NOTIFY))) } else { Ok(Retire::Refused(word | NOTIFY)) }
}

/// Leases that pin the block.
#[must_use]
pub const fn pins(word: u64) -> u32 {
    (word & PINS) as u32
}

/// Whether the block is in the tier.
#[must_use]
pub const fn is_resident(word: u64) -> bool {
    word & RESIDENT != 0
}

/// How often the block has become resident, modulo 2³².
#[must_use]
pub const fn generation(word: u64) -> u32 {
    (word >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Invariant 3: a pinned block is never retired.
    #[test]
    fn a_pinned_block_refuses_to_go_and_the_last_pin_says_so() {
        assert_eq!(pin(0), Err(WordError::NotResident));
        let word = publish(0).unwrap();
        assert_eq!((is_resident(word), pins(word), generation(word)), (true, 0, 1));
        assert_eq!(publish(word), Err(WordError::AlreadyResident));
        let word = pin(pin(word).unwrap()).unwrap();
        let Ok(Retire::Refused(word)) = retire(word) else { panic!("retired under a pin") };
        let (word, told) = unpin(word).unwrap();
        assert!(!told);
        let (word, told) = unpin(word).unwrap();
        assert!(told);
        assert_eq!(unpin(word), Err(WordError::NotPinned));
        let Ok(Retire::Done(word)) = retire(word) else { panic!("not retired") };
        assert_eq!(pin(word), Err(WordError::NotResident));
        assert_eq!(generation(publish(word).unwrap()), 2);
    }

    #[test]
    fn pins_do_not_overflow_into_the_state() {
        let word = publish(0).unwrap() | PINS;
        assert_eq!(pin(word), Err(WordError::TooManyPins));
    }
}
