//! S: the control channel of a VM's packet filter: put a policy in force, then ask what is in force.
//!
//! JSON-RPC 2.0, an object a line, on a Unix socket that `tart run` inherits. An older form wants a revision and answers
//! with more: what it adds is ignored.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::provider::NetworkPolicy;

/// A filter that does not answer by then is not trusted.
const REPLY: Duration = Duration::from_secs(5);
/// The longest line that is read.
const LINE_MAX: usize = 1 << 20;
const EVERYBODY: &str = "0.0.0.0/0";

/// What the filter lets through. The longest prefix wins, and block wins among equals.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Rules {
    pub(super) allow: Vec<String>,
    pub(super) block: Vec<String>,
}

impl Rules {
    pub(super) fn of(policy: &NetworkPolicy) -> Self {
        match policy {
            // The filter's own: what is globally routable, DNS and DHCP.
            NetworkPolicy::Default => Self::default(),
            NetworkPolicy::None => Self { allow: Vec::new(), block: vec![EVERYBODY.to_owned()] },
            NetworkPolicy::Only(ranges) => {
                let once: BTreeSet<&String> = ranges.iter().collect();
                Self { allow: once.into_iter().cloned().collect(), block: vec![EVERYBODY.to_owned()] }
            }
        }
    }

    fn sorted(mut self) -> Self {
        self.allow.sort();
        self.block.sort();
        self
    }
}

/// The farm's end of the channel.
pub(super) struct Control {
    stream: BufReader<UnixStream>,
    id: u64,
}

#[derive(Deserialize)]
struct Reply {
    id: Option<u64>,
    result: Option<Value>,
    error: Option<Fault>,
}

#[derive(Deserialize)]
struct Fault {
    code: i64,
    #[serde(default)]
    message: String,
}

const UNKNOWN_PARAMETERS: i64 = -32602;

impl Control {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream: BufReader::new(stream), id: 0 }
    }

    /// Returns when exactly this policy is in force and the filter has said so.
    pub(super) async fn enforce(&mut self, policy: &NetworkPolicy) -> Result<(), String> {
        let rules = Rules::of(policy);
        let params = json!({"allow": rules.allow, "block": rules.block});
        match self.ask("softnet.policy.set", Some(params)).await? {
            Ok(_) => {}
            Err(Fault { code: UNKNOWN_PARAMETERS, .. }) => self.set_with_revision(&rules).await?,
            Err(fault) => return Err(refused(&fault)),
        }
        let told = self.ask("softnet.policy.get", None).await?.map_err(|fault| refused(&fault))?;
        let told: Rules = serde_json::from_value(told).map_err(|error| format!("the filter's policy: {error}"))?;
        if told.clone().sorted() == rules.clone().sorted() {
            Ok(())
        } else {
            Err(format!("the filter has another policy in force: {told:?}, not {rules:?}"))
        }
    }

    async fn set_with_revision(&mut self, rules: &Rules) -> Result<(), String> {
        let now = self.ask("softnet.policy.get", None).await?.map_err(|fault| refused(&fault))?;
        let revision = now.get("desiredRevision").and_then(Value::as_u64).unwrap_or(0) + 1;
        let params = json!({"allow": rules.allow, "block": rules.block, "desiredRevision": revision});
        self.ask("softnet.policy.set", Some(params)).await?.map(|_| ()).map_err(|fault| refused(&fault))
    }

    async fn ask(&mut self, method: &str, params: Option<Value>) -> Result<Result<Value, Fault>, String> {
        self.id += 1;
        let mut request = json!({"jsonrpc": "2.0", "id": self.id, "method": method});
        if let (Some(object), Some(params)) = (request.as_object_mut(), params) {
            object.insert("params".to_owned(), params);
        }
        let talk = async {
            self.stream.get_mut().write_all(format!("{request}\n").as_bytes()).await.map_err(gone)?;
            let reply = self.reply().await?;
            match (reply.result, reply.error) {
                (_, Some(fault)) => Ok(Err(fault)),
                (Some(result), None) => Ok(Ok(result)),
                (None, None) => Err("the filter answered nothing".to_owned()),
            }
        };
        match tokio::time::timeout(REPLY, talk).await {
            Ok(answer) => answer,
            Err(_late) => Err(format!("the filter did not answer {method} in time")),
        }
    }

    async fn reply(&mut self) -> Result<Reply, String> {
        loop {
            let mut line = Vec::new();
            loop {
                let ready = self.stream.fill_buf().await.map_err(gone)?;
                if ready.is_empty() {
                    return Err("the filter has closed its control channel".to_owned());
                }
                let end = ready.iter().position(|byte| *byte == b'\n');
                let taken = end.map_or(ready.len(), |at| at + 1);
                line.extend_from_slice(&ready[..taken]);
                self.stream.consume(taken);
                if line.len() > LINE_MAX {
                    return Err("the filter says too much".to_owned());
                }
                if end.is_some() {
                    break;
                }
            }
            let reply: Reply =
                serde_json::from_slice(&line).map_err(|error| format!("the filter's answer: {error}"))?;
            // An answer to a question that was given up is not the answer to this one.
            if reply.id == Some(self.id) {
                return Ok(reply);
            }
        }
    }
}

fn gone(error: std::io::Error) -> String {
    format!("the filter's control channel: {error}")
}

fn refused(fault: &Fault) -> String {
    format!("the filter refused ({}): {}", fault.code, fault.message)
}

#[cfg(test)]
mod tests {
    use alloy_shared::wire::network::Network;

    use super::*;

    /// A filter that answers each request with what `answer` makes of it.
    async fn filter(answer: impl Fn(&Value) -> Option<Value> + Send + 'static) -> Control {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut set = tokio::task::JoinSet::new();
        set.spawn(async move {
            let mut lines = BufReader::new(theirs).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let request: Value = serde_json::from_str(&line).unwrap();
                if let Some(mut reply) = answer(&request) {
                    reply["id"] = request["id"].clone();
                    // A late answer to somebody else's question comes first.
                    let stray = json!({"jsonrpc": "2.0", "id": 999, "result": {}});
                    lines.get_mut().get_mut().write_all(format!("{stray}\n{reply}\n").as_bytes()).await.unwrap();
                }
            }
        });
        set.detach_all();
        Control::new(ours)
    }

    fn rules(set: &Value) -> Value {
        json!({"result": {"allow": set["params"]["allow"], "block": set["params"]["block"], "ruleCount": 1}})
    }

    #[test]
    fn each_wish_of_a_job_is_one_set_of_rules() {
        let rules = |asked: &Network| {
            let Rules { allow, block } = Rules::of(&NetworkPolicy::from(asked));
            (allow.join(" "), block.join(" "))
        };
        let ranges = |list: &[&str]| Network::Allow(list.iter().map(|range| (*range).to_owned()).collect());
        for (asked, allow, block) in [
            (Network::Default, "", ""),
            (Network::None, "", "0.0.0.0/0"),
            (ranges(&["10.0.0.0/8"]), "10.0.0.0/8", "0.0.0.0/0"),
            // What the filter would tell once is asked for once.
            (ranges(&["10.0.0.0/8", "1.1.1.1/32", "10.0.0.0/8"]), "1.1.1.1/32 10.0.0.0/8", "0.0.0.0/0"),
        ] {
            assert_eq!(rules(&asked), (allow.to_owned(), block.to_owned()), "{asked:?}");
        }
    }

    #[tokio::test]
    async fn a_policy_counts_when_the_filter_confirms_it() {
        let only = NetworkPolicy::Only(vec!["10.0.0.0/8".into()]);
        let mut honest = filter(|request| {
            Some(match request["method"].as_str() {
                Some("softnet.policy.set") => rules(request),
                _ => json!({"result": {"allow": ["10.0.0.0/8"], "block": ["0.0.0.0/0"], "ruleCount": 2}}),
            })
        })
        .await;
        assert_eq!(honest.enforce(&only).await, Ok(()));
        assert!(honest.enforce(&NetworkPolicy::None).await.unwrap_err().contains("another policy"));
    }

    #[tokio::test]
    async fn the_older_form_gets_its_revision() {
        let mut old = filter(|request| {
            let params = &request["params"];
            Some(match (request["method"].as_str(), params["desiredRevision"].as_u64()) {
                (Some("softnet.policy.set"), None) => json!({"error": {"code": -32602, "message": "desiredRevision"}}),
                (Some("softnet.policy.set"), Some(7)) => rules(request),
                (Some("softnet.policy.set"), Some(_)) => json!({"error": {"code": -32001, "message": "conflict"}}),
                _ => json!({"result": {"allow": [], "block": ["0.0.0.0/0"], "desiredRevision": 6, "bridgeIsolation": true}}),
            })
        })
        .await;
        assert_eq!(old.enforce(&NetworkPolicy::None).await, Ok(()));
    }

    #[tokio::test]
    async fn a_filter_that_refuses_or_leaves_is_not_trusted() {
        let mut refuses = filter(|_| Some(json!({"error": {"code": -32002, "message": "no"}}))).await;
        assert!(refuses.enforce(&NetworkPolicy::Default).await.unwrap_err().contains("-32002"));
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(Control::new(ours).enforce(&NetworkPolicy::Default).await.is_err());
    }
}
