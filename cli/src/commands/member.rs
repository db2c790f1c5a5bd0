//! S: `alloy admin member`: people who sign in with a service of their own, and what they may do.

use alloy_shared::id::UserId;
use alloy_shared::wire::farm::{MemberRequest, MemberView, Role};

use super::admin::role;
use crate::context::App;
use crate::farm::Hosted;
use crate::output::talk::Tone;
use crate::output::{Failure, ago, exit, print, print_json, stdout_is_terminal, table};

/// List, add and remove the people who sign in with Supabase
#[derive(Debug, clap::Subcommand)]
pub(crate) enum MemberVerb {
    /// Show the members and what they may do
    #[command(visible_alias = "ls")]
    List,
    Set(SetArgs),
    Remove(RemoveArgs),
}

/// Make somebody a member, or change what they may do
#[derive(Debug, clap::Args)]
pub(crate) struct SetArgs {
    /// Their user id: a UUID, as Supabase shows it under Authentication
    user_id: UserId,
    /// viewer, developer or admin
    #[arg(long, default_value = "developer", value_parser = role)]
    role: Role,
    /// So that people recognise them in the list
    #[arg(long, value_name = "ADDRESS")]
    email: Option<String>,
}

/// Take somebody out of the farm, at once; their jobs go on
#[derive(Debug, clap::Args)]
#[command(visible_alias = "rm")]
pub(crate) struct RemoveArgs {
    /// Their user id, as `alloy admin member list` shows it
    user_id: UserId,
}

pub(crate) async fn member(app: &App, verb: &MemberVerb) -> Result<i32, Failure> {
    let hosted = Hosted::open_to_read(app).await?;
    let farm = hosted.farm();
    let fail = |error| Failure::of(error, &farm.url);
    match verb {
        MemberVerb::List => {
            let list = farm.client.members().await.map_err(fail)?;
            if app.talk.json() {
                print_json(&list)?;
            } else {
                if list.members.is_empty() {
                    app.talk.say("No members yet: nobody signs in but with a token.");
                    app.talk.hint("alloy admin member set USER_ID --role developer   adds one");
                }
                let now = app.env.now().wall;
                let rows: Vec<Vec<String>> = list.members.iter().map(|member| row(member, now)).collect();
                print(&table(&["USER ID", "ROLE", "EMAIL", "ADDED"], &rows, stdout_is_terminal()))?;
            }
        }
        MemberVerb::Set(args) => {
            let request = MemberRequest { role: args.role, email: args.email.clone() };
            let view = farm.client.set_member(args.user_id, &request).await.map_err(fail)?;
            let who = view.email.clone().unwrap_or_else(|| view.user_id.to_string());
            app.talk.verdict(Tone::Good, "✓", &format!("{who} is {}", view.role.as_str()), None);
            if app.talk.json() {
                print_json(&view)?;
            }
        }
        MemberVerb::Remove(args) => {
            farm.client.remove_member(args.user_id).await.map_err(fail)?;
            app.talk.verdict(Tone::Good, "✓", &format!("{} is no member any more", args.user_id), None);
            if app.talk.json() {
                print_json(&serde_json::json!({ "removed": args.user_id }))?;
            }
        }
    }
    Ok(exit::OK)
}

fn row(member: &MemberView, now: alloy_shared::env::Ms) -> Vec<String> {
    vec![
        member.user_id.to_string(),
        member.role.as_str().to_owned(),
        member.email.clone().unwrap_or_else(|| "–".into()),
        ago(&member.created_at, now),
    ]
}
