//! Web pages that ask the HTTP door from a browser.

use serde_json::json;

use crate::{
    openai_door::served,
    plain_experts::model_dir,
    plain_http::{Answer, JSON, ask},
};

const PAGE: &str = "https://chat.example.org";

/// What a browser asks before a page of `origin` may ask, and what the page then asks.
async fn asked_by_a_page(http: std::net::SocketAddr, origin: &str) -> (Answer, Answer) {
    let wanted =
        "access-control-request-method: POST\r\naccess-control-request-headers: authorization,x-stainless-os\r\n";
    let before = ask(http, "OPTIONS", "/v1/completions", &format!("origin: {origin}\r\n{wanted}"), b"").await;
    let body = json!({"prompt": "sst2 sentence: dull .", "max_tokens": 1}).to_string();
    let page = ask(http, "POST", "/v1/completions", &format!("{JSON}origin: {origin}\r\n"), body.as_bytes()).await;
    (before, page)
}

#[tokio::test(flavor = "multi_thread")]
async fn only_pages_of_named_origins_may_ask() {
    // Would break: a page of a stranger reads answers by the browser of who may ask, or a page that was named cannot.
    let allowed = "access-control-allow-origin";
    let named = served(&model_dir(), |config| {
        config.http_cors_origins = vec![PAGE.parse().unwrap(), "http://localhost:3000".parse().unwrap()];
    })
    .await;
    let (before, page) = asked_by_a_page(named.http, PAGE).await;
    assert_eq!((before.status, before.header(allowed)), (200, Some(PAGE)), "{before:?}");
    assert_eq!(before.header("access-control-allow-headers"), Some("authorization,x-stainless-os"), "{before:?}");
    assert_eq!((page.status, page.header(allowed)), (200, Some(PAGE)), "{page:?}");
    assert!(
        page.header("access-control-expose-headers").is_some_and(|names| names.contains("x-request-id")),
        "{page:?}"
    );
    let refused = ask(named.http, "POST", "/v1/completions", &format!("{JSON}origin: {PAGE}\r\n"), b"{}").await;
    assert_eq!((refused.status, refused.header(allowed)), (400, Some(PAGE)), "a page can read why");
    let (before, page) = asked_by_a_page(named.http, "https://example.org").await;
    assert_eq!((before.header(allowed), page.header(allowed)), (None, None), "{before:?}");

    let all = served(&model_dir(), |config| config.http_cors_origins = vec!["*".parse().unwrap()]).await;
    assert_eq!(asked_by_a_page(all.http, PAGE).await.0.header(allowed), Some("*"));

    let nobody = served(&model_dir(), |_| ()).await;
    let (before, page) = asked_by_a_page(nobody.http, PAGE).await;
    assert_eq!((before.status, before.header(allowed)), (405, None), "{before:?}");
    assert_eq!((page.status, page.header(allowed)), (200, None), "who is no page is answered all the same");
}
