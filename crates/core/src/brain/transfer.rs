//! Transfers: how they begin, and what their ends bring about.

use super::{Brain, State};
use crate::ids::{BlockId, SlotId, TierId, TransferId};
use crate::protocol::{Command, Refusal};

/// A transfer under way: into which tier, which block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    pub(crate) tier: TierId,
    pub(crate) block: BlockId,
    pub(crate) cancelled: bool,
}

/// The transfers under way. An id is an index and a generation, so that a late answer cannot be taken for another's.
#[derive(Debug, Default)]
pub(crate) struct Transfers {
    entries: Vec<(u32, Option<Transfer>)>,
    free: Vec<u32>,
}

impl Transfers {
    fn insert(&mut self, transfer: Transfer) -> TransferId {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push((0, None));
            self.entries.len() as u32 - 1
        });
        let entry = &mut self.entries[index as usize];
        entry.0 += 1;
        entry.1 = Some(transfer);
        TransferId(u64::from(entry.0) << 32 | u64::from(index))
    }

    fn remove(&mut self, id: TransferId) -> Option<Transfer> {
        let index = id.0 as u32;
        let entry = self.entries.get_mut(index as usize)?;
        if u64::from(entry.0) != id.0 >> 32 {
            return None;
        }
        let transfer = entry.1.take()?;
        self.free.push(index);
        Some(transfer)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.free.len() == self.entries.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Transfer> + Clone {
        self.entries.iter().filter_map(|(_, transfer)| transfer.as_ref())
    }

    /// Places for transfers, empty ones included.
    fn places(&self) -> usize {
        self.entries.len()
    }

    /// The transfer in a place.
    fn at(&self, index: usize) -> Option<(TransferId, Transfer)> {
        let (generation, transfer) = self.entries.get(index)?;
        Some((TransferId(u64::from(*generation) << 32 | index as u64), (*transfer)?))
    }

    fn mark_cancelled(&mut self, index: usize) {
        if let Some((_, Some(transfer))) = self.entries.get_mut(index) {
            transfer.cancelled = true;
        }
    }
}

impl Brain {
    /// Begins to bring a block into a slot that was taken for it.
    pub(crate) fn start_load(&mut self, tier: TierId, block: BlockId, slot: SlotId, speculative: bool) {
        let place = self.place_mut(tier, block);
        place.slot = slot.0;
        place.unused = true;
        place.retried = false;
        self.tiers[tier.index()].loads += 1;
        *self.ahead_mut(tier, block) += self.blocks[block.index()].bytes;
        match self.tiers[tier.index()].parent {
            None => self.issue(tier, block, speculative),
            Some(parent) => {
                self.claim(parent, block);
                if self.place(parent, block).state == State::Resident {
                    self.issue(tier, block, speculative);
                } else {
                    self.set_state(tier, block, State::Waiting);
                }
            }
        }
    }

    /// Sends the transfer of a block that has its slot, and whose source is ready.
    fn issue(&mut self, tier: TierId, block: BlockId, speculative: bool) {
        self.set_state(tier, block, State::Loading);
        let transfer = self.transfers.insert(Transfer { tier, block, cancelled: false });
        let slot = SlotId(self.place(tier, block).slot);
        if let Some(parent) = self.tiers[tier.index()].parent {
            // Its use begins, so the disk may bring the next.
            self.mark_used(parent, block);
        }
        self.out.push_back(match self.tiers[tier.index()].parent {
            None => Command::Read { transfer, block, tier, slot, speculative },
            Some(from) => {
                let from_slot = SlotId(self.place(from, block).slot);
                Command::Upload { transfer, block, from, from_slot, to: tier, to_slot: slot }
            }
        });
    }

    pub(crate) fn transfer_done(&mut self, transfer: TransferId) {
        let Some(Transfer { tier, block, .. }) = self.transfers.remove(transfer) else { return };
        let list = self.list_of(tier, block);
        self.tiers[tier.index()].lru.touch(block.index(), list);
        self.place_mut(tier, block).broken = false;
        self.set_state(tier, block, State::Resident);
        if let Some(parent) = self.tiers[tier.index()].parent {
            self.unclaim(parent, block);
        }
        for index in 0..self.tiers[tier.index()].children.len() {
            let child = self.tiers[tier.index()].children[index];
            if self.place(child, block).state == State::Waiting {
                self.issue(child, block, true);
            }
        }
        // Who waits for it has a claim on it.
        let mut index = if self.place(tier, block).claims > 0 { 0 } else { self.demands.len() };
        while index < self.demands.len() {
            let demand = &mut self.demands[index];
            if demand.tier == tier && demand.blocks.contains(&block) {
                demand.missing -= 1;
                if demand.missing == 0 {
                    self.finish_demand(index, None);
                    continue;
                }
            }
            index += 1;
        }
    }

    pub(crate) fn transfer_failed(&mut self, transfer: TransferId, cancelled: bool) {
        let Some(Transfer { tier, block, cancelled: unwanted }) = self.transfers.remove(transfer) else { return };
        // What was to be dropped has been, however it ended: a second try would be for nobody, and whoever wants the
        // block by now begins anew.
        let cancelled = cancelled || unwanted;
        if !cancelled && !self.place(tier, block).retried {
            self.place_mut(tier, block).retried = true;
            self.issue(tier, block, false);
            return;
        }
        if let Some(parent) = self.tiers[tier.index()].parent {
            self.unclaim(parent, block);
        }
        self.place_mut(tier, block).broken |= !cancelled;
        self.give_up(tier, block, tier, cancelled);
    }

    /// The block does not come: neither to this tier nor to those that wait for this one. `failed` is where it broke.
    fn give_up(&mut self, tier: TierId, block: BlockId, failed: TierId, cancelled: bool) {
        self.free_place(tier, block);
        for index in 0..self.tiers[tier.index()].children.len() {
            let child = self.tiers[tier.index()].children[index];
            if self.place(child, block).state == State::Waiting {
                self.unclaim(tier, block);
                self.give_up(child, block, failed, cancelled);
            }
        }
        if cancelled {
            return;
        }
        let mut index = 0;
        while index < self.demands.len() {
            if self.demands[index].tier == tier && self.demands[index].blocks.contains(&block) {
                self.finish_demand(index, Some(Refusal::Transfer { block, tier: failed }));
            } else {
                index += 1;
            }
        }
    }

    /// A cursor has gone, or gone elsewhere: what was brought for it must not count as brought ahead for the others.
    pub(crate) fn forget_unwanted(&mut self) {
        self.cancel_unwanted();
        for tier in 0..self.tiers.len() {
            for block in 0..self.blocks.len() {
                let (tier, block) = (TierId(tier as u32), BlockId(block as u32));
                let place = self.place(tier, block);
                let surplus = || self.tiers[tier.index()].surplus.contains(block.index());
                if place.unused && place.claims == 0 && (!self.soon(tier, block) || surplus()) {
                    self.not_ahead(tier, block);
                }
            }
        }
    }

    /// Whether a cursor will reach the block within twice the window.
    fn soon(&self, tier: TierId, block: BlockId) -> bool {
        let horizon = self.tiers[tier.index()].window_bytes / self.slot_bytes.max(1) + 1;
        self.distance(tier, block).is_some_and(|distance| distance <= 2 * horizon)
    }

    /// Asks to drop the transfers that nobody waits for and that no cursor will reach soon.
    pub(crate) fn cancel_unwanted(&mut self) {
        self.cancel_if(|_, _| true);
    }

    /// As [`Self::cancel_unwanted`], of the transfers that `concerned` says yes to.
    pub(crate) fn cancel_if(&mut self, concerned: impl Fn(TierId, BlockId) -> bool) {
        for index in 0..self.transfers.places() {
            let Some((id, Transfer { tier, block, cancelled })) = self.transfers.at(index) else { continue };
            let wanted = || self.place(tier, block).claims > 0 || self.soon(tier, block);
            if !cancelled && concerned(tier, block) && !wanted() {
                self.transfers.mark_cancelled(index);
                self.out.push_back(Command::Cancel { transfer: id });
            }
        }
    }

    /// The counter of bytes brought and not used, of the wire by which a block comes into a tier.
    pub(crate) fn ahead_mut(&mut self, tier: TierId, block: BlockId) -> &mut u64 {
        match self.tiers[tier.index()].parent {
            None => &mut self.disk_ahead_bytes[self.blocks[block.index()].wire as usize],
            Some(_) => &mut self.tiers[tier.index()].ahead_bytes,
        }
    }

    /// The block no longer counts as brought and not used.
    pub(crate) fn not_ahead(&mut self, tier: TierId, block: BlockId) {
        if self.place(tier, block).unused {
            self.place_mut(tier, block).unused = false;
            let bytes = self.blocks[block.index()].bytes;
            let ahead = self.ahead_mut(tier, block);
            *ahead = ahead.saturating_sub(bytes);
            self.offer(tier, block);
        }
    }

    /// The block is used now.
    pub(crate) fn mark_used(&mut self, tier: TierId, block: BlockId) {
        let place = self.place(tier, block);
        if place.state == State::Absent {
            return;
        }
        if place.expected && self.drop_guess(tier, block) {
            self.governor.used();
        }
        self.not_ahead(tier, block);
        if matches!(self.place(tier, block).state, State::Resident | State::Retiring) {
            let list = self.list_of(tier, block);
            self.tiers[tier.index()].lru.touch(block.index(), list);
        }
    }
}
