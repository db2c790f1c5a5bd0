//! D: what a stranger's bytes may do to a terminal: text, TAB, LF, CR and colours, nothing else.
//!
//! A build's log is hostile input: an escape sequence can retitle the window, write the clipboard or hide what was printed.
//! The filter is a state machine over bytes, so that a sequence or a character cut by a chunk's border is still one.

/// A colour sequence longer than this is dropped; real ones have fewer than twenty bytes.
const SGR_MAX: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Ground,
    /// After ESC.
    Escape,
    /// After ESC and intermediates: one final byte ends it.
    EscapeTail,
    /// Inside `ESC [ …`; what was read is in `held`.
    Csi,
    /// Inside a string sequence (title, clipboard, picture): everything up to its end is dropped.
    Text,
    /// Inside a string sequence, after ESC.
    TextEscape,
}

/// Cleans a stream of bytes for a terminal.
#[derive(Debug)]
pub(crate) struct Sanitizer {
    mode: Mode,
    /// Parameters of a sequence, if it may still become a colour.
    held: Vec<u8>,
    /// False once the sequence cannot be a colour.
    plain: bool,
    /// The bytes of a character whose end has not arrived.
    partial: Vec<u8>,
    /// A colour is on that nobody switched off.
    tinted: bool,
}

impl Default for Sanitizer {
    fn default() -> Self {
        Self { mode: Mode::Ground, held: Vec::new(), plain: true, partial: Vec::new(), tinted: false }
    }
}

impl Sanitizer {
    /// Appends to `out` what of `bytes` a terminal may see.
    pub(crate) fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        for byte in bytes {
            self.byte(*byte, out);
        }
    }

    /// Ends the stream: a cut character becomes a replacement mark, and a colour that was left on is switched off.
    pub(crate) fn finish(&mut self, out: &mut Vec<u8>) {
        self.give_up_partial(out);
        self.mode = Mode::Ground;
        if std::mem::take(&mut self.tinted) {
            out.extend_from_slice(b"\x1b[0m");
        }
    }

    fn byte(&mut self, byte: u8, out: &mut Vec<u8>) {
        if byte.is_ascii() {
            self.give_up_partial(out);
            return self.symbol(char::from(byte), out);
        }
        self.partial.push(byte);
        match std::str::from_utf8(&self.partial) {
            Ok(text) => {
                let symbol = text.chars().next().unwrap_or(char::REPLACEMENT_CHARACTER);
                self.partial.clear();
                self.symbol(symbol, out);
            }
            // It may still become a character.
            Err(error) if error.error_len().is_none() => {}
            Err(_) => self.bad_byte(out),
        }
    }

    /// The newest byte does not continue what is held: what was held is no character, and the byte may start one.
    fn bad_byte(&mut self, out: &mut Vec<u8>) {
        let Some(last) = self.partial.pop() else { return };
        if self.partial.is_empty() {
            // A lone byte of the C1 block is a control character to a terminal in 8-bit mode.
            let symbol = if (0x80..=0x9f).contains(&last) { char::from(last) } else { char::REPLACEMENT_CHARACTER };
            self.symbol(symbol, out);
        } else {
            self.give_up_partial(out);
            self.byte(last, out);
        }
    }

    fn give_up_partial(&mut self, out: &mut Vec<u8>) {
        if !self.partial.is_empty() {
            self.partial.clear();
            self.symbol(char::REPLACEMENT_CHARACTER, out);
        }
    }

    fn symbol(&mut self, symbol: char, out: &mut Vec<u8>) {
        match self.mode {
            Mode::Ground => self.ground(symbol, out),
            Mode::Escape => self.escape(symbol, out),
            Mode::EscapeTail => match symbol {
                ' '..='/' => {}
                '0'..='~' => self.mode = Mode::Ground,
                _ => self.restart(symbol, out),
            },
            Mode::Csi => self.csi(symbol, out),
            Mode::Text | Mode::TextEscape => self.text(symbol, out),
        }
    }

    fn ground(&mut self, symbol: char, out: &mut Vec<u8>) {
        match symbol {
            '\t' | '\n' | '\r' => out.push(symbol as u8),
            '\x1b' => self.mode = Mode::Escape,
            '\u{9b}' => self.start_csi(false),
            '\u{90}' | '\u{98}' | '\u{9d}'..='\u{9f}' => self.mode = Mode::Text,
            '\0'..='\x1f' | '\x7f'..='\u{9f}' => {}
            _ => out.extend_from_slice(symbol.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }

    fn escape(&mut self, symbol: char, out: &mut Vec<u8>) {
        match symbol {
            '[' => self.start_csi(true),
            'P' | 'X' | ']' | '^' | '_' => self.mode = Mode::Text,
            ' '..='/' => self.mode = Mode::EscapeTail,
            '0'..='~' => self.mode = Mode::Ground,
            _ => self.restart(symbol, out),
        }
    }

    fn start_csi(&mut self, may_be_colour: bool) {
        self.held.clear();
        self.plain = may_be_colour;
        self.mode = Mode::Csi;
    }

    fn csi(&mut self, symbol: char, out: &mut Vec<u8>) {
        match symbol {
            '0'..='9' | ';' | ':' => {
                self.plain &= self.held.len() < SGR_MAX;
                if self.plain {
                    self.held.push(symbol as u8);
                }
            }
            'm' if self.plain => {
                out.extend_from_slice(b"\x1b[");
                out.extend_from_slice(&self.held);
                out.push(b'm');
                self.tinted = !matches!(self.held.as_slice(), b"" | b"0");
                self.mode = Mode::Ground;
            }
            ' '..='?' => self.plain = false,
            '@'..='~' => self.mode = Mode::Ground,
            _ => self.restart(symbol, out),
        }
    }

    /// A string sequence ends at BEL or ST; a new line ends it too, so that one stray byte cannot swallow a whole log.
    fn text(&mut self, symbol: char, out: &mut Vec<u8>) {
        let after_escape = self.mode == Mode::TextEscape;
        self.mode = Mode::Text;
        match symbol {
            '\\' if after_escape => self.mode = Mode::Ground,
            '\x07' | '\u{9c}' => self.mode = Mode::Ground,
            '\x1b' => self.mode = Mode::TextEscape,
            '\n' | '\x18' | '\x1a' => self.restart(symbol, out),
            _ if after_escape => {
                self.mode = Mode::Escape;
                self.escape(symbol, out);
            }
            _ => {}
        }
    }

    /// The sequence was no sequence: the symbol is read as if nothing had come before.
    fn restart(&mut self, symbol: char, out: &mut Vec<u8>) {
        self.mode = Mode::Ground;
        self.ground(symbol, out);
    }
}

/// A short text from outside, such as a path or a name, fit for one line of a terminal.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(parts: &[&[u8]]) -> Vec<u8> {
        let (mut filter, mut out) = (Sanitizer::default(), Vec::new());
        for part in parts {
            filter.push(part, &mut out);
        }
        filter.finish(&mut out);
        out
    }

    #[test]
    fn text_and_colours_pass_and_the_rest_does_not() {
        for (input, expected) in [
            (&b"plain\ttext\r\n"[..], &b"plain\ttext\r\n"[..]),
            ("grün ✓ 日本\n".as_bytes(), "grün ✓ 日本\n".as_bytes()),
            (b"\x1b[31mred\x1b[0m", b"\x1b[31mred\x1b[0m"),
            (b"\x1b[1;38;5;200mx\x1b[m", b"\x1b[1;38;5;200mx\x1b[m"),
            (b"\x1b[31mleft on", b"\x1b[31mleft on\x1b[0m"),
            (b"a\x1b[2Jb\x1b[10;10Hc\x1b[?25ld", b"abcd"),
            (b"a\x1b]0;title\x07b", b"ab"),
            (b"a\x1b]52;c;Zm9v\x1b\\b", b"ab"),
            (b"a\x1bP+q544e\x1b\\b\x1b_apc\x1b\\c\x1b^pm\x1b\\d", b"abcd"),
            (b"a\x1b(Bb\x1bcc\x1b7d", b"abcd"),
            (b"a\x9b31mb", b"ab"),
            ("a\u{9b}31mb\u{9d}0;t\u{9c}c".as_bytes(), b"abc"),
            (b"\x07\x08\x0b\x0e\x7f\0x", b"x"),
            (b"\xff\xc3(", "\u{fffd}\u{fffd}(".as_bytes()),
            (b"cut \xe2\x82", "cut \u{fffd}".as_bytes()),
            (b"a\x1b]never ended\nnext line\n", b"a\nnext line\n"),
            (b"\x1b[>4;2mx\x1b[?1my", b"xy"),
            (b"\x1b\x1b[31mx\x1b[0m", b"\x1b[31mx\x1b[0m"),
        ] {
            let got = clean(&[input]);
            assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(expected), "{input:?}");
        }
    }

    #[test]
    fn a_colour_of_endless_length_is_dropped() {
        let mut input = b"\x1b[".to_vec();
        input.extend(std::iter::repeat_n(b'1', 100_000));
        input.extend_from_slice(b"mx");
        assert_eq!(clean(&[&input]), b"x");
    }

    /// A small generator is enough here: the seed is printed, so a failure replays.
    struct Dice(u64);
    impl Dice {
        fn roll(&mut self, sides: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % sides as u64) as usize
        }
    }

    const PIECES: &[&[u8]] = &[
        b"word ",
        b"\n",
        b"\t",
        b"\x1b",
        b"[",
        b"]",
        b"31",
        b";",
        b"m",
        b"\x07",
        b"\x1b\\",
        b"\x9b",
        b"\x9d",
        b"\xc2\x9b",
        b"\xc2",
        b"\xe2\x82\xac",
        b"\xe2\x82",
        b"\xf0\x9f\x98\x80",
        b"\xff",
        b"\x1b[0m",
        b"\x1b[1;31m",
        b"\x1b]0;t\x07",
        b"P",
        b"\0",
        b"\x18",
    ];

    #[test]
    fn splits_change_nothing_and_only_harmless_bytes_come_out() {
        for seed in 1..=2_000u64 {
            let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let input: Vec<u8> = (0..dice.roll(60)).flat_map(|_| PIECES[dice.roll(PIECES.len())].to_vec()).collect();
            let whole = clean(&[&input]);
            let mut parts = Vec::new();
            let mut rest = input.as_slice();
            while !rest.is_empty() {
                let (part, tail) = rest.split_at(1 + dice.roll(rest.len().min(5)));
                parts.push(part);
                rest = tail;
            }
            assert_eq!(clean(&parts), whole, "seed {seed}: {input:?}");
            assert_eq!(clean(&[&whole]), whole, "seed {seed}: not stable for {input:?}");
            assert_harmless(&whole, seed);
        }
    }

    fn assert_harmless(bytes: &[u8], seed: u64) {
        let text = std::str::from_utf8(bytes).unwrap_or_else(|_| panic!("seed {seed}: not UTF-8"));
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            rest = &rest[c.len_utf8()..];
            if c == '\x1b' {
                let end = rest.find('m').unwrap_or_else(|| panic!("seed {seed}: no colour in {text:?}"));
                let params = rest[..end].strip_prefix('[').unwrap_or_else(|| panic!("seed {seed}: {text:?}"));
                assert!(params.bytes().all(|b| b.is_ascii_digit() || b == b';' || b == b':'), "seed {seed}: {text:?}");
                rest = &rest[end + 1..];
            } else {
                assert!(!c.is_control() || matches!(c, '\t' | '\n' | '\r'), "seed {seed}: {c:?} in {text:?}");
            }
        }
    }
}
