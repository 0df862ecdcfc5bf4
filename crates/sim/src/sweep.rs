//! Many questions at once: a sweep over configurations, on several threads, answers in the order of the questions.
//!
//! What it does not do: know what the questions are.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Answers every question on at most `threads` threads. The answers don't depend on how many there are.
///
/// A question that panics brings the caller down with it, as without threads.
pub fn map<Q: Send, A: Send>(questions: Vec<Q>, threads: usize, answer: impl Fn(Q) -> A + Sync) -> Vec<A> {
    let count = questions.len();
    if threads <= 1 || count <= 1 {
        return questions.into_iter().map(answer).collect();
    }
    let questions: Vec<Mutex<Option<Q>>> = questions.into_iter().map(|q| Mutex::new(Some(q))).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut answers = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(slot) = questions.get(index) else { return answers };
            let question = slot.lock().ok().and_then(|mut question| question.take());
            answers.extend(question.map(|question| (index, answer(question))));
        }
    };
    let mut answers: Vec<(usize, A)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(count)).map(|_| scope.spawn(work)).collect();
        let joined = workers.into_iter().map(|worker| worker.join());
        joined.flat_map(|answers| answers.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    answers.sort_unstable_by_key(|(index, _)| *index);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_the_order_of_the_questions_whatever_the_threads() {
        for threads in [0, 1, 2, 7, 100] {
            let answers = map((0u64..50).collect(), threads, |n| n * n);
            assert_eq!(answers, (0u64..50).map(|n| n * n).collect::<Vec<_>>(), "{threads} threads");
        }
        assert!(map(Vec::<u8>::new(), 4, |n| n).is_empty());
    }
}
