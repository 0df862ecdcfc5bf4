//! The text that a run generates, as a pane of its view shows it: the end of it, wrapped, without anything that could
//! command the terminal.

use ratatui::text::Span;

/// So much of the text's end is kept; more than this is on no terminal.
const KEPT_BYTES: usize = 64 << 10;

/// The end of a text that grows.
#[derive(Debug, Default)]
pub struct Story {
    text: String,
}

impl Story {
    /// What came next.
    pub fn push(&mut self, text: &str) {
        let shown = text.chars().filter_map(|c| match c {
            '\n' => Some('\n'),
            '\t' => Some(' '),
            c if c.is_control() => None,
            c => Some(c),
        });
        self.text.extend(shown);
        // Twice as much before anything goes, so that what stays is seldom moved.
        if self.text.len() > 2 * KEPT_BYTES {
            let mut from = self.text.len() - KEPT_BYTES;
            while !self.text.is_char_boundary(from) {
                from += 1;
            }
            self.text.drain(..from);
        }
    }

    /// The last lines of it, as many as fit, the latest last; cells, not characters, are counted.
    pub fn tail(&self, width: u16, height: u16) -> Vec<String> {
        let (width, height) = (usize::from(width), usize::from(height));
        if width == 0 || height == 0 {
            return Vec::new();
        }
        let mut lines: Vec<String> = Vec::new();
        for paragraph in self.text.rsplit('\n') {
            let wrapped = wrap(paragraph, width);
            lines.extend(wrapped.into_iter().rev());
            if lines.len() >= height {
                break;
            }
        }
        lines.truncate(height);
        lines.reverse();
        lines
    }
}

/// Cells that a text takes.
fn cells(text: &str) -> usize {
    Span::raw(text).width()
}

/// A paragraph in lines of at most `width` cells, broken at spaces where there are any.
fn wrap(paragraph: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let (mut line, mut used) = (String::new(), 0);
    for word in paragraph.split_inclusive(' ') {
        let length = cells(word.trim_end());
        if used > 0 && used + length > width {
            lines.push(std::mem::take(&mut line));
            used = 0;
        }
        if length <= width {
            line.push_str(word);
            used += cells(word);
            continue;
        }
        let mut buffer = [0; 4];
        for letter in word.chars() {
            let letter: &str = letter.encode_utf8(&mut buffer);
            if used > 0 && used + cells(letter) > width {
                lines.push(std::mem::take(&mut line));
                used = 0;
            }
            line.push_str(letter);
            used += cells(letter);
        }
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn story(text: &str) -> Story {
        let mut story = Story::default();
        story.push(text);
        story
    }

    #[test]
    fn the_end_is_shown_wrapped_at_words() {
        let story = story("Once upon a time\nthere was a little girl named Lily");
        assert_eq!(story.tail(12, 9), ["Once upon a ", "time", "there was a ", "little girl ", "named Lily"]);
        assert_eq!(story.tail(12, 2), ["little girl ", "named Lily"]);
        assert!(story.tail(0, 5).is_empty() && story.tail(5, 0).is_empty());
    }

    #[test]
    fn words_longer_than_a_line_and_wide_letters_are_cut() {
        assert_eq!(story("0123456789").tail(4, 9), ["0123", "4567", "89"]);
        assert_eq!(story("日本語日本").tail(5, 9), ["日本", "語日", "本"], "two cells each");
        assert_eq!(story("日本").tail(1, 9), ["日", "本"], "what fits nowhere ends all the same");
        assert_eq!(story("a\n\nb\n").tail(4, 9), ["a", "", "b", ""]);
    }

    #[test]
    fn nothing_in_a_text_commands_the_terminal() {
        assert_eq!(story("a\x1b[2Jb\r\u{9b}c\td\u{7}").tail(20, 1), ["a[2Jbc d"]);
    }

    #[test]
    fn only_so_much_is_kept() {
        let mut story = Story::default();
        for _ in 0..40_000 {
            story.push("süß ");
        }
        assert!(story.text.len() <= 2 * KEPT_BYTES && story.text.len() >= KEPT_BYTES - 4);
        assert_eq!(story.tail(8, 1), ["süß süß "]);
    }
}
