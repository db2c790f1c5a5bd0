//! The command of a job that describes itself: it prints the stream of its own job and attempt, step by step, and waits for
//! files that a test makes. `noise tell STEP…`:
//!
//! | Step | Does |
//! |---|---|
//! | `bytes:N` | prints that much more of the stream |
//! | `stay:N` | in this attempt, is quiet for ever |
//! | `until:PATH` | is quiet until the file is there |
//! | `flood:PATH` | prints some MB a second until the file is there |
//! | `trickle:PATH` | the same with some KB a second |
//! | `plain:N` | prints that much of a flood without a line end, whatever the job |
//! | `file:NAME:N` | writes a file of that length with the stream of its name |
//! | `told:DIR` | writes how much it printed into a file that is named after job and attempt |

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::noise;

const LOOK: Duration = Duration::from_millis(5);
const PIECE: u64 = 16 << 10;
const DROP: u64 = 512;
const GULP: u64 = 1 << 20;

struct Teller {
    /// Standard output without a buffer: what was printed is in the pipe.
    out: File,
    seed: u64,
    name: String,
    printed: u64,
}

/// How much these steps print, if that is a matter of the steps alone.
pub fn length(steps: &[String]) -> Option<u64> {
    let prints = |step: &String| match step.split_once(':')? {
        ("bytes" | "plain", len) => len.parse().ok(),
        ("flood" | "trickle", _) => None,
        _ => Some(0),
    };
    steps.iter().map(prints).sum()
}

/// Does the steps, one after the other.
pub fn tell(steps: &[String]) -> Result<()> {
    let var = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
    let (job, attempt) = (var("ALLOY_JOB_ID")?, var("ALLOY_JOB_ATTEMPT")?);
    let out = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    let seed = noise::stream(&job, attempt.parse()?);
    let mut teller = Teller { out, seed, name: format!("{job}.{attempt}"), printed: 0 };
    steps.iter().try_for_each(|step| teller.step(step).with_context(|| format!("step {step}")))
}

impl Teller {
    fn step(&mut self, step: &str) -> Result<()> {
        let (verb, rest) = step.split_once(':').context("written VERB:REST")?;
        match verb {
            "bytes" => self.print(rest.parse()?)?,
            "stay" => {
                while self.name.ends_with(&format!(".{rest}")) {
                    std::thread::park();
                }
            }
            "until" => wait(Path::new(rest)),
            "flood" => self.flow(Path::new(rest), PIECE, LOOK)?,
            "trickle" => self.flow(Path::new(rest), DROP, Duration::from_millis(100))?,
            "plain" => self.plain(rest.parse()?)?,
            "file" => {
                let (name, len) = rest.split_once(':').context("written NAME:N")?;
                let mut file = File::create(name)?;
                noise::blocks(noise::stream(name, 0), len.parse()?).try_for_each(|block| file.write_all(&block))?;
            }
            "told" => fs::write(Path::new(rest).join(&self.name), self.printed.to_string())?,
            _ => bail!("there is no such step"),
        }
        Ok(())
    }

    fn print(&mut self, len: u64) -> Result<()> {
        let end = self.printed + len;
        while self.printed < end {
            let piece = (end - self.printed).min(GULP);
            self.out.write_all(&noise::range(self.seed, self.printed, piece))?;
            self.printed += piece;
        }
        Ok(())
    }

    fn plain(&mut self, len: u64) -> Result<()> {
        let mut at = 0;
        while at < len {
            let piece = (len - at).min(GULP);
            self.out.write_all(&noise::flood(at, piece))?;
            at += piece;
        }
        self.printed += len;
        Ok(())
    }

    fn flow(&mut self, end: &Path, piece: u64, pause: Duration) -> Result<()> {
        while !end.exists() {
            self.print(piece)?;
            std::thread::sleep(pause);
        }
        Ok(())
    }
}

fn wait(path: &Path) {
    while !path.exists() {
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steps_print_is_known_unless_they_print_until_they_are_told() {
        let length = |steps: &[&str]| length(&steps.iter().map(|step| (*step).to_owned()).collect::<Vec<_>>());
        assert_eq!(length(&[]), Some(0));
        assert_eq!(length(&["file:a:9", "bytes:20", "until:/gate", "stay:1", "plain:5", "told:/dir"]), Some(25));
        assert_eq!(length(&["bytes:20", "trickle:/gate"]), None);
        assert_eq!(length(&["flood:/gate", "bytes:20"]), None);
    }
}
