//! S: everything Alloy itself says, on standard error: steps, notes, progress bars.
//!
//! At a terminal the lines are those of a person's tool; elsewhere, and under `CI=true`, the same facts are one stamped
//! line each, without bars. With `--json` a program reads: warnings and errors are one JSON object a line, and what standard
//! output tells anyway is left out.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;

use alloy_shared::env::Env;
use anstyle::{AnsiColor, Style};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Failure;
use super::sanitize::one_line;

/// Redraws per second of the bars.
const REDRAWS: u8 = 10;

#[derive(Clone)]
pub(crate) struct Talk {
    /// A person watches.
    live: bool,
    json: bool,
    bars: MultiProgress,
    env: Arc<dyn Env>,
}

/// How a line of the talk is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Good,
    Bad,
    Note,
}

impl Tone {
    const fn style(self) -> Style {
        match self {
            Self::Good => AnsiColor::Green.on_default().bold(),
            Self::Bad => AnsiColor::Red.on_default().bold(),
            Self::Note => AnsiColor::Yellow.on_default(),
        }
    }
}

const DIM: Style = Style::new().dimmed();

impl Talk {
    pub(crate) fn new(env: Arc<dyn Env>, json: bool, ci: bool) -> Self {
        let live = std::io::stderr().is_terminal() && !ci && !json;
        let target = if live { ProgressDrawTarget::stderr_with_hz(REDRAWS) } else { ProgressDrawTarget::hidden() };
        Self { live, json, bars: MultiProgress::with_draw_target(target), env }
    }

    pub(crate) fn live(&self) -> bool {
        self.live
    }

    pub(crate) fn json(&self) -> bool {
        self.json
    }

    pub(crate) fn bars(&self) -> MultiProgress {
        self.bars.clone()
    }

    /// `  Packing    1,204 files, 48.2 MB`, or `10:31:03 packing 1,204 files, 48.2 MB`.
    pub(crate) fn step(&self, verb: &str, text: &str) {
        let text = one_line(text);
        if self.live {
            self.write(&format!("  {verb:<10} {text}"));
        } else {
            self.stamped(&format!("{} {text}", verb.to_lowercase()));
        }
    }

    /// The line that names the job, or another of the same weight.
    pub(crate) fn headline(&self, text: &str, rest: &str) {
        let (text, rest) = (one_line(text), one_line(rest));
        if self.live {
            let bold = Style::new().bold();
            self.write(&format!("{bold}{text}{bold:#}  {DIM}{rest}{DIM:#}"));
        } else {
            self.stamped(&format!("job {text} {rest}"));
        }
    }

    /// The last line of something: a mark, what happened, and how long it took.
    pub(crate) fn verdict(&self, tone: Tone, mark: &str, text: &str, took: Option<&str>) {
        let text = one_line(text);
        let style = tone.style();
        if self.live {
            let gap = 72usize.saturating_sub(text.chars().count() + 2).max(2);
            let took = took.map_or(String::new(), |took| format!("{:gap$}{DIM}{took}{DIM:#}", ""));
            self.write(&format!("{style}{mark}{style:#} {text}{took}"));
        } else {
            let took = took.map_or(String::new(), |took| format!("  ({took})"));
            self.stamped(&format!("{text}{took}"));
        }
    }

    /// Something to know that is no error.
    pub(crate) fn warn(&self, text: &str) {
        if self.json {
            self.write(&serde_json::json!({ "type": "warning", "message": text }).to_string());
            return;
        }
        let style = Tone::Note.style();
        let text = one_line(text);
        if self.live {
            self.write(&format!("{style}warning:{style:#} {text}"));
        } else {
            self.stamped(&format!("warning: {text}"));
        }
    }

    pub(crate) fn hint(&self, text: &str) {
        let text = one_line(text);
        if self.live {
            self.write(&format!("  {DIM}hint:{DIM:#} {text}"))
        } else {
            self.stamped(&format!("hint: {text}"))
        }
    }

    /// A line as it is.
    pub(crate) fn say(&self, text: &str) {
        let text = one_line(text);
        if self.live { self.write(&text) } else { self.stamped(&text) }
    }

    pub(crate) fn fail(&self, failure: &Failure, exit_code: i32) {
        if self.json {
            self.write(&failure.json(exit_code).to_string());
            return;
        }
        for (label, line) in failure.lines() {
            match label {
                "error" => {
                    let style = Tone::Bad.style();
                    self.write(&format!("{style}error:{style:#} {line}"));
                }
                "" => self.write(&format!("  {line}")),
                label => self.write(&format!("  {DIM}{label}:{DIM:#} {line}")),
            }
        }
    }

    /// A bar over bytes; invisible unless a person watches.
    pub(crate) fn bytes_bar(&self, label: &str, total: u64) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::new(total));
        let style = ProgressStyle::with_template(
            "  {prefix:10} {bar:24} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {msg}",
        );
        if let Ok(style) = style {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_prefix(one_line(label));
        bar
    }

    /// A line that changes in place, for a wait whose end nobody knows.
    pub(crate) fn spinner(&self, label: &str, text: &str) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::new_spinner());
        if let Ok(style) = ProgressStyle::with_template("  {prefix:10} {msg} {spinner}") {
            bar.set_style(style);
        }
        bar.set_prefix(one_line(label));
        bar.set_message(one_line(text));
        bar
    }

    fn stamped(&self, text: &str) {
        if self.json {
            return;
        }
        let now = self.env.now().wall.rfc3339();
        // The date is in the CI's own log; the second in UTC is what compares across machines.
        let time = now.get(11..19).unwrap_or(&now);
        self.write(&format!("{time} {text}"));
    }

    fn write(&self, line: &str) {
        if self.live && !std::io::stderr().is_terminal() {
            // It hung up. The bars take a failure to draw for a bug.
            self.bars.set_draw_target(ProgressDrawTarget::hidden());
        }
        self.bars.suspend(|| {
            // A closed standard error must not end the command.
            let _ = writeln!(anstream::stderr().lock(), "{line}");
        });
    }
}
