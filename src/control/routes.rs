//! The one table of routes.
//!
//! Why: the router, the OpenAPI document and the tests must agree; all read this.
//! Never: has a route that isn't in the table.
//! Start at [`table`].

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{MethodRouter, delete, get, head, patch, post, put};

use super::error::ApiError;
use super::{
    App, apply, disks, events, handlers, metrics, settings, stats, traces, upload, volumes,
};

/// One method of one path.
pub struct Route {
    /// `GET`, `HEAD`, `POST`, `PUT`, `PATCH` or `DELETE`.
    pub method: &'static str,
    /// With `{name}` for what varies.
    pub path: &'static str,
    handler: MethodRouter<App>,
}

/// Every route.
#[must_use]
pub fn table() -> Vec<Route> {
    let route = |method, path, handler| Route { method, path, handler };
    vec![
        route("GET", "/v1/images", get(handlers::list_images)),
        route("POST", "/v1/images", post(handlers::create_image)),
        route("GET", "/v1/images/{name}", get(handlers::get_image)),
        route("PATCH", "/v1/images/{name}", patch(handlers::steer_image)),
        route("DELETE", "/v1/images/{name}", delete(handlers::delete_image)),
        route("POST", "/v1/images/{name}/fetch", post(handlers::fetch_image)),
        route("POST", "/v1/images/{name}/cancel", post(handlers::cancel_image)),
        route("POST", "/v1/images/{name}/cleanup", post(handlers::clean_up_image)),
        route("POST", "/v1/images/{name}/scrub", post(handlers::scrub_image)),
        route("GET", "/v1/images/{name}/inspection", get(handlers::inspect_image)),
        route("HEAD", "/v1/images/{name}/upload", head(upload::offset)),
        route("PUT", "/v1/images/{name}/upload", put(upload::write)),
        route("POST", "/v1/images/{name}/trace", post(traces::start)),
        route("GET", "/v1/images/{name}/trace", get(traces::get)),
        route("DELETE", "/v1/images/{name}/trace", delete(traces::stop)),
        route("GET", "/v1/images/{name}/prefetch", get(traces::get_prefetch)),
        route("PUT", "/v1/images/{name}/prefetch", put(traces::put_prefetch)),
        route("DELETE", "/v1/images/{name}/prefetch", delete(traces::delete_prefetch)),
        route("GET", "/v1/settings", get(settings::get)),
        route("PATCH", "/v1/settings", patch(settings::change)),
        route("GET", "/v1/node", get(handlers::get_node)),
        route("POST", "/v1/node/fail", post(handlers::fail_node)),
        route("POST", "/v1/node/return", post(handlers::return_node)),
        route("GET", "/v1/disks", get(disks::list)),
        route("POST", "/v1/disks", post(disks::add)),
        route("GET", "/v1/disks/{uuid}", get(disks::get)),
        route("PATCH", "/v1/disks/{uuid}", patch(disks::change)),
        route("DELETE", "/v1/disks/{uuid}", delete(disks::remove)),
        route("GET", "/v1/attachments", get(handlers::list_attachments)),
        route("POST", "/v1/attachments", post(handlers::create_attachment)),
        route("GET", "/v1/attachments/{id}", get(handlers::get_attachment)),
        route("DELETE", "/v1/attachments/{id}", delete(handlers::delete_attachment)),
        route("GET", "/v1/volumes", get(volumes::list_volumes)),
        route("POST", "/v1/volumes", post(volumes::create_volume)),
        route("GET", "/v1/volumes/{name}", get(volumes::get_volume)),
        route("DELETE", "/v1/volumes/{name}", delete(volumes::delete_volume)),
        route("POST", "/v1/volumes/{name}/attach", post(volumes::attach_volume)),
        route("POST", "/v1/volumes/{name}/detach", post(volumes::detach_volume)),
        route("GET", "/v1/classes", get(volumes::list_classes)),
        route("GET", "/v1/classes/{name}", get(volumes::get_class)),
        route("DELETE", "/v1/classes/{name}", delete(volumes::delete_class)),
        route("POST", "/v1/apply", post(apply::apply)),
        route("GET", "/v1/stats", get(stats::show)),
        route("GET", "/v1/events", get(events::stream)),
        route("GET", "/v1/doctor", get(handlers::doctor)),
        route("GET", "/v1/openapi.json", get(handlers::openapi)),
        route("GET", "/healthz", get(handlers::health)),
        route("GET", "/metrics", get(metrics::scrape)),
    ]
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Root, or the daemon's own user.
    Owner,
    /// Whoever else may use the socket.
    Other,
}

/// The router over [`table`] for one kind of callers, with JSON for what no route matches.
pub fn router(app: App, caller: Caller) -> Router {
    let mut router = Router::new();
    for route in table() {
        router = router.route(route.path, route.handler);
    }
    router
        .fallback(|| async {
            let hint = "see GET /v1/openapi.json for the routes";
            ApiError::new(StatusCode::NOT_FOUND, "no-such-route", "no such route", hint)
        })
        .method_not_allowed_fallback(|| async {
            let (code, message) = ("method-not-allowed", "this route has no such method");
            let hint = "see GET /v1/openapi.json for the methods";
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, code, message, hint)
        })
        .layer(axum::middleware::from_fn_with_state(app.clone(), count))
        .layer(axum::Extension(caller))
        .with_state(app)
}

/// Counts an answer under its route's pattern, never under the path itself.
async fn count(State(app): State<App>, request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|p| p.as_str().to_owned());
    let response = next.run(request).await;
    app.http.count(&method, route.as_deref(), response.status());
    response
}
