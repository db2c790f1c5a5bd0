//! S: the router. [`rows`] has one line per route with its audience; the gate in front of a row enforces it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ::bytes::Bytes;
use alloy_shared::limits;
use alloy_shared::wire::{ErrorCode, Problem};
use axum::Router;
use axum::body::HttpBody as _;
use axum::extract::{DefaultBodyLimit, MatchedPath, RawPathParams, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, Version, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::{RequestBodyTimeoutLayer, TimeoutLayer};
use tracing::Instrument as _;
use utoipa::PartialSchema as _;
use utoipa::openapi::path::{HttpMethod, Operation, PathItem};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Components, ContentBuilder, InfoBuilder, OpenApi, OpenApiBuilder, Ref, RefOr, ResponseBuilder};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};
use utoipa_axum::routes;

use crate::App;
use crate::auth::{self, Denied};
use crate::error::{self, Fault};

pub mod bytes;
pub mod extract;
pub mod farm;
pub mod images;
pub mod jobs;
pub mod members;
mod plain;
mod range;
pub mod retention;
pub mod socket;

use extract::{NamedWorker, Peer, header_text, parameter};

/// Who may use a route. `Public` is the closed list of routes without a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Audience {
    Public,
    Viewer,
    Developer,
    Admin,
    /// The holder of one open attempt's token.
    Attempt,
    /// An enrolled worker, which proves itself by its key once it is connected.
    Worker,
}

/// A route of the table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteRow {
    pub path: String,
    pub method: &'static str,
    pub audience: Audience,
}

/// How long a route may take: `Json` answers at once, `Stream` as long as bytes flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Json,
    Stream,
}

type Row = (Audience, Kind, UtoipaMethodRouter<Arc<App>>);

fn rows() -> Vec<Row> {
    use Audience::{Admin, Attempt, Developer, Public, Viewer, Worker};
    use Kind::{Json, Stream};
    vec![
        (Public, Json, routes!(farm::health)),
        (Public, Json, routes!(farm::ready)),
        (Public, Json, routes!(farm::enrol)),
        (Viewer, Json, routes!(farm::openapi)),
        (Viewer, Json, routes!(farm::info)),
        (Viewer, Json, routes!(farm::whoami)),
        (Developer, Stream, routes!(jobs::submit)),
        (Viewer, Json, routes!(jobs::list)),
        (Viewer, Stream, routes!(jobs::show)),
        (Developer, Json, routes!(jobs::cancel)),
        (Viewer, Stream, routes!(jobs::feed)),
        (Viewer, Json, routes!(farm::list_workers)),
        (Viewer, Json, routes!(farm::show_worker)),
        (Admin, Json, routes!(farm::invite)),
        (Admin, Json, routes!(farm::drain)),
        (Admin, Json, routes!(farm::resume)),
        (Admin, Json, routes!(farm::revoke_worker)),
        (Viewer, Json, routes!(images::list)),
        (Admin, Json, routes!(images::pull)),
        (Admin, Json, routes!(images::pin)),
        (Admin, Json, routes!(images::remove)),
        (Worker, Stream, routes!(socket::connect)),
        (Admin, Json, routes!(farm::create_token)),
        (Admin, Json, routes!(farm::list_tokens)),
        (Admin, Json, routes!(farm::revoke_token)),
        (Admin, Json, routes!(members::list)),
        (Admin, Json, routes!(members::set, members::remove)),
        (Admin, Json, routes!(retention::show, retention::set)),
        (Developer, Stream, routes!(bytes::put_source)),
        (Developer, Stream, routes!(bytes::post_tar)),
        (Developer, Stream, routes!(bytes::post_pack)),
        (Viewer, Stream, routes!(bytes::job_log)),
        (Viewer, Json, routes!(bytes::list_artifacts)),
        (Viewer, Stream, routes!(bytes::get_artifact)),
        (Attempt, Stream, routes!(bytes::attempt_source)),
        (Attempt, Stream, routes!(bytes::attempt_blobs)),
        (Attempt, Stream, routes!(bytes::attempt_artifact_len, bytes::put_attempt_artifact)),
    ]
}

/// Every route with who may use it, sorted by path.
pub fn table() -> Vec<RouteRow> {
    let mut table: Vec<RouteRow> = rows()
        .into_iter()
        .flat_map(|(audience, _, (_, paths, _))| {
            paths.paths.into_iter().flat_map(move |(path, mut item)| {
                let operations = operations(&mut item).into_iter();
                operations.map(|(method, _)| RouteRow { path: path.clone(), method, audience }).collect::<Vec<_>>()
            })
        })
        .collect();
    table.sort();
    table
}

pub fn router(app: Arc<App>) -> Router {
    let mut router = OpenApiRouter::new();
    for (audience, kind, (schemas, paths, methods)) in rows() {
        let methods = match kind {
            Kind::Json => methods.route_layer(TimeoutLayer::with_status_code(
                StatusCode::SERVICE_UNAVAILABLE,
                Duration::from_millis(limits::JSON_ANSWER_MS),
            )),
            Kind::Stream => methods,
        };
        let gate = middleware::from_fn_with_state((app.clone(), audience), gate);
        router = router.routes((schemas, paths, methods.route_layer(gate)));
    }
    let (router, _) = router.split_for_parts();
    router
        .layer(DefaultBodyLimit::max(limits::JSON_BODY_MAX as usize))
        .layer(RequestBodyTimeoutLayer::new(Duration::from_millis(limits::BODY_IDLE_MS)))
        .layer(CatchPanicLayer::custom(error::panicked))
        .layer(middleware::from_fn_with_state(app.clone(), edge))
        .with_state(app)
}

/// Lets a request through to its handler, or answers in its place.
async fn gate(
    State((app, audience)): State<(Arc<App>, Audience)>,
    params: RawPathParams,
    request: Request,
    next: Next,
) -> Result<Response, Fault> {
    let (mut parts, body) = request.into_parts();
    let header = header_text(&parts.headers, "authorization");
    let org = header_text(&parts.headers, alloy_shared::wire::header::ORG);
    let store = &*app.store;
    let denied = match audience {
        Audience::Public => None,
        Audience::Viewer | Audience::Developer | Audience::Admin => {
            match app.auth.principal_in(store, header, org).await {
                Ok(principal) => parts.extensions.insert(Arc::new(principal)).and(None),
                Err(denied) => Some(denied),
            }
        }
        Audience::Attempt => match auth::attempt_grant(store, &app.grants, attempt(&params)?, header).await {
            Ok(grant) => parts.extensions.insert(grant).and(None),
            Err(denied) => Some(denied),
        },
        Audience::Worker => match auth::named_worker(store, header).await {
            Ok(id) => parts.extensions.insert(NamedWorker(id)).and(None),
            Err(denied) => Some(denied),
        },
    };
    match denied {
        None => check_role(audience, &parts)?,
        Some(denied) => return Err(refuse(&app, &Peer::of(&parts, app.behind_proxy), denied)),
    }
    Ok(next.run(Request::from_parts(parts, body)).await)
}

/// A wrong credential counts against its peer; one peer that keeps guessing is told to wait.
pub(crate) fn refuse(app: &App, peer: &Peer, denied: Denied) -> Fault {
    if denied.is_guess()
        && let Err(throttled) = app.auth.failed(&peer.key())
    {
        return throttled.into();
    }
    denied.into()
}

fn check_role(audience: Audience, parts: &axum::http::request::Parts) -> Result<(), Fault> {
    match audience {
        Audience::Viewer => extract::check_role(parts, alloy_shared::wire::farm::Role::Viewer),
        Audience::Developer => extract::check_role(parts, alloy_shared::wire::farm::Role::Developer),
        Audience::Admin => extract::check_role(parts, alloy_shared::wire::farm::Role::Admin),
        Audience::Public | Audience::Attempt | Audience::Worker => Ok(()),
    }
}

fn attempt(params: &RawPathParams) -> Result<alloy_shared::id::AttemptRef, Fault> {
    let find = |name: &str| params.iter().find(|(key, _)| *key == name).map_or("", |(_, value)| value);
    let job = find("job").parse().map_err(|bad: alloy_shared::id::BadName| parameter("job", &bad.why))?;
    let attempt = find("attempt").parse().map_err(|_| parameter("attempt", "is a number from 1"))?;
    Ok(alloy_shared::id::AttemptRef { job, attempt })
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Around every request: its id, its line in the log, and the form of what went wrong.
async fn edge(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let id = request_id(&request, || format!("req_{:016x}", app.env.dice()));
    // `Debug` of the headers must not show it, whoever logs them.
    if let Some(value) = request.headers_mut().get_mut(header::AUTHORIZATION) {
        value.set_sensitive(true);
    }
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let method = request.method().clone();
    let may_be_left_unread = request.version() < Version::HTTP_2 && !request.body().is_end_stream();
    let started = app.env.now().mono;
    let span = tracing::debug_span!("http.request", request.id = id, http.route = route);
    let response = next.run(request).instrument(span.clone()).await;
    let mut response = span.in_scope(|| error::finish(response, &id, &route));
    if may_be_left_unread && response.status().as_u16() >= 400 {
        // The rest of the body cannot be told from another request, so the connection ends; a client that is not told
        // would send its next request into the end.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let duration_ms = app.env.now().mono.since(started);
    tracing::debug!(parent: &span, http.status = response.status().as_u16(), duration_ms, "{method} {route}");
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID, value);
    }
    response
}

/// The caller's own id if it is harmless in a log, else a new one.
fn request_id(request: &Request, fresh: impl FnOnce() -> String) -> String {
    let harmless = |text: &&str| {
        (1..=64).contains(&text.len())
            && text.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.'))
    };
    match header_text(request.headers(), REQUEST_ID.as_str()).filter(harmless) {
        Some(text) => text.to_owned(),
        None => fresh(),
    }
}

/// The OpenAPI document, made of the handlers.
pub fn openapi() -> &'static Bytes {
    static DOCUMENT: OnceLock<Bytes> = OnceLock::new();
    DOCUMENT.get_or_init(|| {
        serde_json::to_vec_pretty(&document()).unwrap_or_else(|_| unreachable!("a document is plain data")).into()
    })
}

fn document() -> OpenApi {
    let mut components = Components::new();
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("alloy token").build();
    components.add_security_scheme("token", SecurityScheme::Http(bearer));
    components.schemas.insert("Problem".to_owned(), Problem::schema());
    components.schemas.insert("ErrorCode".to_owned(), ErrorCode::schema());
    components.schemas.insert("FieldError".to_owned(), alloy_shared::wire::FieldError::schema());
    let info = InfoBuilder::new()
        .title("Alloy")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("A self-hosted build farm. Every error is a `Problem` with a stable `code`."))
        .build();
    let base = OpenApiBuilder::new().info(info).components(Some(components)).build();
    let mut router: OpenApiRouter<Arc<App>> = OpenApiRouter::with_openapi(base);
    for (audience, _, (schemas, mut paths, methods)) in rows() {
        for (_, operation) in paths.paths.values_mut().flat_map(operations) {
            describe(operation, audience);
        }
        router = router.routes((schemas, paths, methods));
    }
    router.into_openapi()
}

/// What holds for every operation: who may call it, and what it answers when it fails.
fn describe(operation: &mut Operation, audience: Audience) {
    operation.security = match audience {
        Audience::Public => Some(Vec::new()),
        Audience::Viewer | Audience::Developer | Audience::Admin | Audience::Attempt | Audience::Worker => {
            Some(vec![SecurityRequirement::new("token", Vec::<String>::new())])
        }
    };
    let problem = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
    let response = ResponseBuilder::new()
        .description("A problem, as RFC 9457 has it")
        .content("application/problem+json", problem)
        .build();
    operation.responses.responses.insert("default".to_owned(), RefOr::T(response));
}

fn operations(item: &mut PathItem) -> Vec<(&'static str, &mut Operation)> {
    let all = [
        (HttpMethod::Get, &mut item.get),
        (HttpMethod::Put, &mut item.put),
        (HttpMethod::Post, &mut item.post),
        (HttpMethod::Delete, &mut item.delete),
        (HttpMethod::Head, &mut item.head),
        (HttpMethod::Patch, &mut item.patch),
    ];
    all.into_iter().filter_map(|(method, slot)| slot.as_mut().map(|operation| (word(&method), operation))).collect()
}

fn word(method: &HttpMethod) -> &'static str {
    match method {
        HttpMethod::Get => "GET",
        HttpMethod::Put => "PUT",
        HttpMethod::Post => "POST",
        HttpMethod::Delete => "DELETE",
        HttpMethod::Head => "HEAD",
        HttpMethod::Patch => "PATCH",
        HttpMethod::Options => "OPTIONS",
        HttpMethod::Trace => "TRACE",
    }
}
