//! S: `alloy admin retention`: how long things are kept.

use alloy_shared::limits::KEEP_DAYS_MAX;
use alloy_shared::wire::farm::{Kept, RetentionRequest, RetentionView};

use crate::context::App;
use crate::farm::Hosted;
use crate::output::talk::Tone;
use crate::output::{Failure, exit, plural, print, print_json, stdout_is_terminal, table};

/// Show and set how long jobs, artifacts, logs and sources are kept
#[derive(Debug, clap::Subcommand)]
pub(crate) enum RetentionVerb {
    /// Show for how many days each is kept, and who says so
    Show,
    Set(SetArgs),
}

/// Keep some of it longer or shorter than the farm does; what is not named stays as it is
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub(crate) struct SetArgs {
    /// Jobs with their events, and what is left of their logs and artifacts, after their end: days, `forever` or `farm`
    #[arg(long, value_name = "DAYS", value_parser = wish)]
    jobs: Option<Wish>,
    /// Artifacts, after their attempt's end
    #[arg(long, value_name = "DAYS", value_parser = wish)]
    artifacts: Option<Wish>,
    /// Logs, after their attempt's end
    #[arg(long, value_name = "DAYS", value_parser = wish)]
    logs: Option<Wish>,
    /// Sources that no job needs, after their last upload or submit
    #[arg(long, value_name = "DAYS", value_parser = wish)]
    sources: Option<Wish>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// As the farm does, whatever that is.
    Farm,
    /// 0: for ever.
    Days(u32),
}

fn wish(text: &str) -> Result<Wish, String> {
    match text {
        "farm" => Ok(Wish::Farm),
        "forever" => Ok(Wish::Days(0)),
        text => match text.parse() {
            Ok(days) if (1..=KEEP_DAYS_MAX).contains(&days) => Ok(Wish::Days(days)),
            _ => Err(format!("is 1 to {KEEP_DAYS_MAX} days, `forever` or `farm`")),
        },
    }
}

pub(crate) async fn retention(app: &App, verb: &RetentionVerb) -> Result<i32, Failure> {
    let hosted = Hosted::open_to_read(app).await?;
    let farm = hosted.farm();
    let fail = |error| Failure::of(error, &farm.url);
    let known = farm.client.retention().await.map_err(fail)?;
    let view = match verb {
        RetentionVerb::Show => known,
        RetentionVerb::Set(args) => {
            let view = farm.client.set_retention(&merged(&known, args)).await.map_err(fail)?;
            app.talk.verdict(Tone::Good, "✓", "what is older goes when the farm looks next, within an hour", None);
            view
        }
    };
    if app.talk.json() {
        print_json(&view)?;
    } else {
        let all = [("jobs", view.jobs), ("artifacts", view.artifacts), ("logs", view.logs), ("sources", view.sources)];
        let rows: Vec<Vec<String>> = all.into_iter().map(|(what, kept)| row(what, &kept)).collect();
        print(&table(&["WHAT", "KEPT", "SAYS"], &rows, stdout_is_terminal()))?;
    }
    Ok(exit::OK)
}

/// What the organisation says already, with what is asked for in its place.
fn merged(known: &RetentionView, args: &SetArgs) -> RetentionRequest {
    let days = |wish: Option<Wish>, kept: Kept| match wish {
        None => kept.own.then_some(kept.days),
        Some(Wish::Farm) => None,
        Some(Wish::Days(days)) => Some(days),
    };
    RetentionRequest {
        jobs_days: days(args.jobs, known.jobs),
        artifacts_days: days(args.artifacts, known.artifacts),
        logs_days: days(args.logs, known.logs),
        sources_days: days(args.sources, known.sources),
    }
}

fn row(what: &str, kept: &Kept) -> Vec<String> {
    let span = |days: u32| if days == 0 { "for ever".to_owned() } else { plural(days.into(), "day") };
    let says = if kept.own { format!("you; the farm: {}", span(kept.farm_days)) } else { "the farm".to_owned() };
    vec![what.to_owned(), span(kept.days), says]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_numbers_or_words() {
        assert_eq!(wish("30"), Ok(Wish::Days(30)));
        assert_eq!((wish("forever"), wish("farm")), (Ok(Wish::Days(0)), Ok(Wish::Farm)));
        for wrong in ["0", "-1", "1.5", "30d", "", "36501"] {
            assert!(wish(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_not_named_stays_as_it_is() {
        let farm = |days| Kept { days, own: false, farm_days: days };
        let own = |days| Kept { days, own: true, farm_days: 90 };
        let known = RetentionView { jobs: own(7), artifacts: farm(30), logs: own(0), sources: farm(14) };
        let args = SetArgs {
            jobs: None,
            artifacts: Some(Wish::Days(3)),
            logs: Some(Wish::Farm),
            sources: Some(Wish::Days(0)),
        };
        let asked = merged(&known, &args);
        assert_eq!((asked.jobs_days, asked.artifacts_days), (Some(7), Some(3)));
        assert_eq!((asked.logs_days, asked.sources_days), (None, Some(0)));
        assert_eq!(row("jobs", &known.jobs), ["jobs", "7 days", "you; the farm: 90 days"]);
        assert_eq!(row("logs", &known.logs), ["logs", "for ever", "you; the farm: 90 days"]);
        assert_eq!(row("artifacts", &known.artifacts), ["artifacts", "30 days", "the farm"]);
    }
}
