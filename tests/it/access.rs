//! Who may do what, and what bad input gets: over the real server, driven by its own OpenAPI document.

use alloy_tests::farm::{Farm, Setup, output};
use alloy_tests::observe::Api;
use anyhow::{Context as _, Result};
use reqwest::Method;
use serde_json::{Value, json};

/// The closed list of routes without a token. Enrolment carries its own.
const PUBLIC: [&str; 3] = ["/healthz", "/readyz", "/v1/workers/enrol"];
/// What each role may do beyond reading; an attempt's and a worker's routes have credentials of their own.
const DEVELOPER: [(&str, &str); 5] = [
    ("POST", "/v1/jobs"),
    ("POST", "/v1/jobs/{id}/cancel"),
    ("PUT", "/v1/sources/{digest}"),
    ("POST", "/v1/sources"),
    ("POST", "/v1/packs"),
];
const ADMIN: [(&str, &str); 15] = [
    ("POST", "/v1/workers/invites"),
    ("POST", "/v1/workers/{id}/drain"),
    ("POST", "/v1/workers/{id}/resume"),
    ("DELETE", "/v1/workers/{id}"),
    ("GET", "/v1/tokens"),
    ("POST", "/v1/tokens"),
    ("DELETE", "/v1/tokens/{id}"),
    ("GET", "/v1/members"),
    ("PUT", "/v1/members/{user_id}"),
    ("DELETE", "/v1/members/{user_id}"),
    ("GET", "/v1/retention"),
    ("PUT", "/v1/retention"),
    ("POST", "/v1/images"),
    ("POST", "/v1/images/pin"),
    ("POST", "/v1/images/rm"),
];

const USER: &str = "3f0c2f1e-8a51-4c1e-9d0b-6f1f3f0f9a11";

async fn empty_farm() -> Result<Farm> {
    Farm::start(Setup { workers: 0, ..Setup::default() }).await
}

/// Every operation that the server says it has.
async fn operations(api: &Api) -> Result<Vec<(Method, String)>> {
    let document = api.get("/openapi.json").await?;
    let paths = document["paths"].as_object().context("paths")?;
    let mut out = Vec::new();
    for (path, item) in paths {
        for method in item.as_object().context("operations")?.keys() {
            if let Ok(method) = method.to_uppercase().parse::<Method>()
                && ["GET", "PUT", "POST", "DELETE", "HEAD", "PATCH"].contains(&method.as_str())
            {
                out.push((method, path.clone()));
            }
        }
    }
    Ok(out)
}

/// A path with something plausible in each place.
fn filled(path: &str) -> String {
    path.replace("{id}", "job_00000000000000000000000001")
        .replace("{job}", "job_00000000000000000000000001")
        .replace("{attempt}", "1")
        .replace("{user_id}", USER)
        .replace("{digest}", &"0".repeat(64))
        .replace("{*path}", "a.txt")
        .replace("{path}", "a.txt")
}

async fn token(api: &Api, role: &str) -> Result<Api> {
    let made = api.post("/v1/tokens", &json!({ "name": role, "role": role })).await?;
    Ok(Api::new(&api.url, Some(made["token"].as_str().context("a token")?)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_route_outside_the_public_list_answers_401_without_a_token() -> Result<()> {
    let farm = empty_farm().await?;
    let operations = operations(&farm.api()).await?;
    assert!(operations.len() >= 20, "{operations:?}");
    for wrong in [None, Some("nonsense"), Some("alloy_pat_0000000000000000000000000000000000000F")] {
        let api = Api::new(&farm.url(), wrong);
        // A peer that guesses is slowed down: its 429 tells as little as a 401.
        let refused: &[u16] = if wrong.is_some() { &[401, 429] } else { &[401] };
        for (method, path) in &operations {
            let answer = api.request(method.clone(), &filled(path)).send().await?;
            let status = answer.status().as_u16();
            if PUBLIC.contains(&path.as_str()) {
                continue;
            }
            assert!(refused.contains(&status), "{method} {path} with {wrong:?} answers {status}");
            if method != Method::HEAD {
                let problem: Value = answer.json().await.with_context(|| format!("{method} {path}"))?;
                let helps = problem["hint"].is_string() || problem["retry_after_s"].is_u64();
                assert!(helps && problem["request_id"].is_string(), "{problem}");
            }
        }
    }
    for path in ["/healthz", "/readyz"] {
        let answer = Api::new(&farm.url(), None).request(Method::GET, path).send().await?;
        assert!(answer.status().is_success(), "{path}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_role_may_do_its_part_and_no_more() -> Result<()> {
    let farm = empty_farm().await?;
    let admin = farm.api();
    let (viewer, developer) = (token(&admin, "viewer").await?, token(&admin, "developer").await?);
    for (method, path) in operations(&admin).await? {
        let row = (method.as_str(), path.as_str());
        let own_credential = path.starts_with("/v1/attempts") || path == "/v1/worker/connect";
        if PUBLIC.contains(&row.1) || own_credential {
            continue;
        }
        let needs_admin = ADMIN.contains(&row);
        let needs_developer = needs_admin || DEVELOPER.contains(&row);
        for (who, api, denied) in [("viewer", &viewer, needs_developer), ("developer", &developer, needs_admin)] {
            let status = api.request(method.clone(), &filled(&path)).send().await?.status().as_u16();
            assert_eq!(status == 403, denied, "{who}: {method} {path} answers {status}");
            assert_ne!(status, 401, "{who}: {method} {path}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_token_opens_nothing_any_more() -> Result<()> {
    let farm = empty_farm().await?;
    let made = farm.api().post("/v1/tokens", &json!({ "name": "laptop", "role": "developer" })).await?;
    let (token, id) = (made["token"].as_str().context("a token")?, made["view"]["id"].as_str().context("an id")?);
    let api = Api::new(&farm.url(), Some(token));
    assert_eq!(api.get("/v1/whoami").await?["name"], "laptop");
    let answer = farm.api().request(Method::DELETE, &format!("/v1/tokens/{id}")).send().await?;
    assert!(answer.status().is_success(), "{}", answer.status());
    assert_eq!(api.request(Method::GET, "/v1/whoami").send().await?.status(), 401);
    let list = farm.api().get("/v1/tokens").await?;
    assert!(!list.to_string().contains(token), "a token is shown once");
    Ok(())
}

/// An access token as Supabase Auth makes it with a project's shared secret.
fn access_token(url: &str, secret: &str) -> String {
    use base64::Engine as _;
    let now_s = alloy_shared::env::Env::now(&alloy_shared::runtime::SystemEnv::detached()).wall.0 / 1_000;
    let claims = json!({
        "iss": format!("{url}/auth/v1"), "sub": USER, "aud": "authenticated", "exp": now_s + 3_600, "iat": now_s,
        "role": "authenticated", "email": "ada@example.com",
    });
    let part = |bytes: &[u8]| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes);
    let header = json!({ "alg": "HS256", "typ": "JWT" }).to_string();
    let signed = format!("{}.{}", part(header.as_bytes()), part(claims.to_string().as_bytes()));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret.as_bytes());
    format!("{signed}.{}", part(ring::hmac::sign(&key, signed.as_bytes()).as_ref()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_signs_in_is_let_in_as_the_member_that_the_command_line_made() -> Result<()> {
    let mut farm = empty_farm().await?;
    let (url, secret) = ("https://project.test", "a shared secret of at least thirty-two bytes");
    let config = farm.dir().join("home/config/alloy");
    std::fs::create_dir_all(&config)?;
    let text = format!("supabase_url = \"{url}\"\nsupabase_jwt_secret = \"{secret}\"\n");
    std::fs::write(config.join("orchestrator.toml"), text)?;
    farm.kill_orchestrator();
    farm.start_orchestrator().await?;

    let person = access_token(url, secret);
    let as_person = async |args: &[&str]| {
        let mut command = farm.alloy(args);
        command.env("ALLOY_TOKEN", &person);
        output(command).await
    };
    let out = as_person(&["list"]).await?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(4), "{said}");
    assert!(said.contains("no member") && said.contains(&format!("alloy admin member set {USER}")), "{said}");

    let set = ["admin", "member", "set", USER, "--role", "developer", "--email", "ada@example.com", "--json"];
    let made: Value = serde_json::from_slice(&output(farm.alloy(&set)).await?.stdout)?;
    assert_eq!((&made["user_id"], &made["role"]), (&json!(USER), &json!("developer")));
    let out = as_person(&["list"]).await?;
    assert_eq!(out.status.code(), Some(0), "{}", String::from_utf8_lossy(&out.stderr));
    let listed: Value =
        serde_json::from_slice(&output(farm.alloy(&["admin", "member", "list", "--json"])).await?.stdout)?;
    assert_eq!(listed, json!({ "members": [made] }));
    let shown = output(farm.alloy(&["admin", "member", "list"])).await?;
    assert!(String::from_utf8_lossy(&shown.stdout).contains("ada@example.com"), "{shown:?}");
    assert_eq!(as_person(&["admin", "member", "list"]).await?.status.code(), Some(4), "a developer is no admin");

    for code in [0, 5] {
        let out = output(farm.alloy(&["admin", "member", "remove", USER])).await?;
        assert_eq!(out.status.code(), Some(code), "{}", String::from_utf8_lossy(&out.stderr));
    }
    assert_eq!(as_person(&["list"]).await?.status.code(), Some(4), "out at once");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_makes_lists_and_revokes_a_token() -> Result<()> {
    let farm = empty_farm().await?;
    let alloy = async |token: &str, args: &[&str]| {
        let mut command = farm.alloy(args);
        command.env("ALLOY_TOKEN", token);
        let out = alloy_tests::farm::output(command).await?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        Ok::<_, anyhow::Error>((out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned(), said))
    };
    let (code, made, said) = alloy(farm.token(), &["token", "create", "laptop", "--role", "viewer", "--json"]).await?;
    assert_eq!(code, Some(0), "{said}");
    let made: Value = serde_json::from_str(&made).with_context(|| made.clone())?;
    let (token, id) = (made["token"].as_str().context("a token")?, made["view"]["id"].as_str().context("an id")?);
    let (code, list, said) = alloy(token, &["worker", "list", "--json"]).await?;
    assert_eq!(code, Some(0), "the token works: {list} {said}");
    let (_, list, _) = alloy(farm.token(), &["token", "list"]).await?;
    let row = list.lines().find(|line| line.contains(id)).context("it is in the list")?;
    assert!(row.contains("laptop") && !row.contains("revoked"), "{list}");

    // Again changes nothing and says the same.
    for turn in ["once", "again"] {
        let (code, view, said) = alloy(farm.token(), &["token", "revoke", id, "--json"]).await?;
        assert_eq!(code, Some(0), "{turn}: {said}");
        let view: Value = serde_json::from_str(&view).with_context(|| view.clone())?;
        let told = (view["id"].as_str(), view["name"].as_str(), view["revoked"].as_bool());
        assert_eq!(told, (Some(id), Some("laptop"), Some(true)), "{turn}: {view}");
        let (code, _, said) = alloy(farm.token(), &["token", "revoke", id]).await?;
        assert!(code == Some(0) && said.contains("laptop") && said.contains("void"), "{turn}: {said}");
    }
    let (code, _, said) = alloy(token, &["worker", "list"]).await?;
    assert!(code == Some(4) && said.contains("revoked"), "{code:?} {said}");
    let (_, list, _) = alloy(farm.token(), &["token", "list"]).await?;
    assert!(list.lines().any(|line| line.contains(id) && line.contains("revoked")), "{list}");
    let (code, _, said) =
        alloy(farm.token(), &["token", "revoke", &id.replace(|c: char| c.is_ascii_digit(), "0")]).await?;
    assert!(code == Some(5) && said.contains("token"), "{code:?} {said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invitation_enrols_one_worker() -> Result<()> {
    let farm = empty_farm().await?;
    let invite = farm.api().post("/v1/workers/invites", &json!({})).await?;
    let token = invite["token"].as_str().context("a token")?;
    let join = async |name: &str| {
        let mut join = farm.command("worker");
        join.arg("join").arg(farm.url()).arg(token).args(["--name", name, "--state-dir"]).arg(farm.dir().join(name));
        alloy_tests::farm::output(join).await
    };
    let first = join("first").await?;
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let second = join("second").await?;
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && !said.contains(token), "{said}");
    assert_eq!(farm.api().get("/v1/workers").await?["workers"].as_array().map(Vec::len), Some(1));
    let key = std::fs::read_dir(farm.dir().join("first"))?.flatten().find(|entry| {
        entry.file_name().to_string_lossy().contains("key") || entry.file_name().to_string_lossy().contains("identity")
    });
    let key = key.context("the worker has a key")?.metadata()?;
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&key.permissions()) & 0o077, 0, "nobody else reads it");
    Ok(())
}

/// A body for `POST /v1/jobs`, its status, code, and the field that is named.
fn bad_specs() -> Vec<(Value, u16, &'static str, &'static str)> {
    let spec = |spec: Value| json!({ "spec": spec });
    let long = "x".repeat(200_000);
    vec![
        (spec(json!({})), 422, "invalid_spec", "shell"),
        (spec(json!({ "shell": "a", "argv": ["b"] })), 422, "invalid_spec", "argv"),
        (spec(json!({ "shell": "" })), 422, "invalid_spec", "shell"),
        (spec(json!({ "shell": "a\0b" })), 422, "invalid_spec", "shell"),
        (spec(json!({ "shell": long })), 422, "invalid_spec", "shell"),
        (spec(json!({ "argv": ["a", "b\0"] })), 422, "invalid_spec", "argv[1]"),
        (spec(json!({ "shell": "a", "env": { "A B": "hunter2" } })), 422, "invalid_spec", "env.A B"),
        (spec(json!({ "shell": "a", "env": { "1A": "hunter2" } })), 422, "invalid_spec", "env.1A"),
        (spec(json!({ "shell": "a", "env": { "A": "hunter2\0" } })), 422, "invalid_spec", "env.A"),
        (spec(json!({ "shell": "a", "labels": { "": "x" } })), 422, "invalid_spec", "labels"),
        (spec(json!({ "shell": "a", "labels": { "chip": "" } })), 422, "invalid_spec", "labels.chip"),
        (spec(json!({ "shell": "a", "artifacts": ["a[b"] })), 422, "invalid_spec", "artifacts[0]"),
        (spec(json!({ "shell": "a", "artifacts": ["ok", "../x"] })), 422, "invalid_spec", "artifacts[1]"),
        (spec(json!({ "shell": "a", "artifacts": ["/etc/passwd"] })), 422, "invalid_spec", "artifacts[0]"),
        (spec(json!({ "shell": "a", "image": "bad image;rm" })), 422, "invalid_spec", "image"),
        (spec(json!({ "shell": "a", "retries": 1000 })), 422, "invalid_spec", "retries"),
        (spec(json!({ "shell": "a", "timeout_ms": 0 })), 422, "invalid_spec", "timeout_ms"),
        (spec(json!({ "shell": "a", "timeout_ms": "long" })), 400, "invalid_body", "spec.timeout_ms"),
        (spec(json!({ "shell": "a", "colour": "red" })), 400, "invalid_body", "spec.colour"),
        (json!({ "spec": { "shell": "a" }, "source": "abc" }), 400, "invalid_body", "source"),
        (json!({ "spec": { "shell": "a" }, "source": "0".repeat(64) }), 409, "source_incomplete", ""),
        (json!([]), 400, "invalid_body", ""),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_specs_are_refused_with_their_field_and_without_their_secrets() -> Result<()> {
    let farm = empty_farm().await?;
    let api = farm.api();
    for (body, status, code, field) in bad_specs() {
        let shown: String = body.to_string().chars().take(120).collect();
        let (got, problem) = api.try_post("/v1/jobs", &body).await?;
        let told = (got.as_u16(), problem["code"].as_str());
        assert_eq!(told, (status, Some(code)), "{shown} gave {problem}");
        let fields: Vec<_> =
            problem["errors"].as_array().into_iter().flatten().map(|e| e["field"].to_string()).collect();
        let named = field.is_empty() || fields.iter().any(|found| found.contains(field));
        assert!(named, "{shown} names {fields:?}, not {field}");
        assert!(problem["message"].as_str().is_some_and(|text| text.len() > 8), "{shown}: {problem}");
        assert!(problem["hint"].is_string() || !fields.is_empty(), "{shown}: {problem}");
        assert!(!problem.to_string().contains("hunter2"), "a secret is echoed: {problem}");
        assert!(problem.to_string().len() < 4_000, "{shown}: the answer is as long as the question");
    }
    assert_eq!(api.get("/v1/jobs").await?["jobs"], json!([]), "nothing was stored");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_are_problem_documents_too() -> Result<()> {
    let farm = empty_farm().await?;
    let api = farm.api();
    let cases: [(Method, &str, &str, Vec<u8>, u16); 9] = [
        (Method::POST, "/v1/jobs", "application/json", b"{".to_vec(), 400),
        (Method::POST, "/v1/jobs", "application/json", vec![b' '; 2 << 20], 413),
        (Method::POST, "/v1/tokens", "application/json", br#"{"name":"x","role":"king"}"#.to_vec(), 400),
        (Method::POST, "/v1/tokens", "text/plain", b"x".to_vec(), 400),
        (Method::GET, "/v1/jobs/nonsense", "", Vec::new(), 404),
        (Method::GET, "/v1/jobs?limit=many", "", Vec::new(), 400),
        (Method::GET, "/v1/jobs?state=asleep", "", Vec::new(), 400),
        (Method::GET, "/v1/nothing", "", Vec::new(), 404),
        (Method::DELETE, "/v1/jobs", "", Vec::new(), 405),
    ];
    for (method, path, kind, body, status) in cases {
        let has_body = !body.is_empty();
        let request = api.request(method.clone(), path).header("content-type", kind).body(body);
        let answer = request.send().await?;
        assert_eq!(answer.status().as_u16(), status, "{method} {path}");
        // A body that may be left unread ends the connection, and the client is told not to use it again.
        let ends = answer.headers().get("connection").is_some_and(|value| value == "close");
        assert_eq!(ends, has_body, "{method} {path}");
        let kind = answer.headers().get("content-type").map(|kind| kind.to_str().unwrap_or("").to_owned());
        assert_eq!(kind.as_deref(), Some("application/problem+json"), "{method} {path}");
        let problem: Value = answer.json().await?;
        assert_eq!(problem["status"], status);
        assert!(problem["code"].is_string() && problem["message"].is_string(), "{problem}");
        assert!(problem["request_id"].is_string(), "{problem}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn labels_that_no_worker_has_are_refused_at_submit() -> Result<()> {
    let farm = Farm::start(Setup { workers: 1, ..Setup::default() }).await?;
    let body = json!({ "spec": { "shell": "true", "labels": { "planet": "mars" } } });
    let (status, problem) = farm.api().try_post("/v1/jobs", &body).await?;
    assert_eq!((status.as_u16(), problem["code"].as_str()), (422, Some("no_such_worker")), "{problem}");
    assert!(problem.to_string().contains("planet"), "{problem}");
    Ok(())
}
