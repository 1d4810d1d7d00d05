//! A real headless browser, driven through chromedriver. If there is none, [`Browser::start`] says so.

use super::{PATIENCE, POLL, eventually, skipped};
use fantoccini::error::CmdError;
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use nix::unistd::geteuid;
use prefetchd::cli::servers::on_path;
use serde_json::{Value, json};
use std::fmt::Display;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

pub struct Browser {
    client: Client,
    driver: Child,
    address: SocketAddr,
    session: String,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Returns `None` if no browser or no chromedriver is installed.
    pub async fn start() -> Option<Self> {
        let browser = on_path(&["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]);
        let (Some(browser), Some(driver)) = (browser, on_path(&["chromedriver"])) else {
            skipped("Chromium and chromedriver are not installed");
            return None;
        };
        let profile = tempfile::Builder::new().prefix("prefetchd-browser-").tempdir().unwrap();
        let mut driver = match on_path(&["setpriv"]) {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "KILL"]).arg(driver);
                command
            }
            None => Command::new(driver),
        };
        let driver = driver.arg("--port=0").env("TMPDIR", profile.path()).env("HOME", profile.path());
        let mut driver = driver.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut said = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = said.find_map(|line| {
            let line = line.unwrap();
            line.strip_suffix('.')?.rsplit_once("started successfully on port ")?.1.parse().ok()
        });
        let address = SocketAddr::from(([127, 0, 0, 1], port.expect("chromedriver names its port")));
        std::thread::spawn(move || said.for_each(drop));

        let mut args = vec![
            format!("--user-data-dir={}", profile.path().join("profile").display()),
            // The browser exits when this pipe closes.
            "--remote-debugging-pipe".to_owned(),
        ];
        let quiet = ["headless=new", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking"];
        let quiet = quiet.iter().chain(&["disable-component-update", "disable-sync", "no-first-run"]);
        args.extend(quiet.map(|name| format!("--{name}")));
        args.push("--window-size=1280,1000".to_owned());
        if geteuid().is_root() {
            args.push("--no-sandbox".to_owned());
        }
        let capabilities = json!({
            "goog:chromeOptions": {"binary": browser, "args": args},
            "goog:loggingPrefs": {"browser": "ALL"},
        });
        let client = ClientBuilder::new(HttpConnector::new())
            .capabilities(capabilities.as_object().unwrap().clone())
            .connect(&format!("http://{address}"))
            .await
            .unwrap();
        let session = client.session_id().await.unwrap().unwrap();
        Some(Self { client, driver, address, session, _profile: profile })
    }

    pub async fn open(&self, page: impl Display) {
        self.goes_to(page).await;
        self.shows("#link", "live").await;
    }

    /// Navigates, whatever the page shows afterwards.
    pub async fn goes_to(&self, page: impl Display) {
        let page = page.to_string();
        let url = if page.starts_with("http://") { page } else { format!("http://{page}/") };
        self.client.goto(&url).await.unwrap();
    }

    pub async fn run(&self, script: &str) -> Value {
        self.client.execute(script, vec![]).await.unwrap_or_else(|error| panic!("{script}: {error}"))
    }

    /// Returns the text of the first matching element as it is in the document, or `null` if there is none.
    pub async fn text(&self, selector: &str) -> Option<String> {
        let text = self.run(&format!("return document.querySelector({})?.textContent", json!(selector))).await;
        text.as_str().map(str::to_owned)
    }

    /// Waits until the element contains this text.
    pub async fn shows(&self, selector: &str, text: &str) -> String {
        let what = format!("{selector} shows {text:?}");
        let shown = eventually(
            &what,
            async || self.text(selector).await,
            |shown| shown.as_ref().is_some_and(|shown| shown.contains(text)),
        );
        shown.await.unwrap()
    }

    pub async fn is_gone(&self, selector: &str) {
        let what = format!("{selector} is gone");
        eventually(&what, async || self.text(selector).await, Option::is_none).await;
    }

    pub async fn is_enabled(&self, selector: &str) -> bool {
        self.client.find(Locator::Css(selector)).await.unwrap().is_enabled().await.unwrap()
    }

    /// Clicks as a person does: a hidden, covered or disabled element cannot be clicked.
    pub async fn click(&self, selector: &str) {
        let click = async || {
            let element = self.client.find(Locator::Css(selector)).await?;
            if element.is_enabled().await? { element.click().await.map(|()| true) } else { Ok(false) }
        };
        // The page may have replaced the element a moment ago.
        let clicked: Result<bool, CmdError> =
            eventually(&format!("{selector} is clicked"), click, |clicked| matches!(clicked, Ok(true))).await;
        clicked.unwrap();
    }

    pub async fn write(&self, selector: &str, text: &str) {
        let write = async || {
            let input = self.client.find(Locator::Css(selector)).await?;
            input.clear().await?;
            input.send_keys(text).await
        };
        // A dialog does not open at once.
        eventually(&format!("{selector} is written to"), write, Result::is_ok).await.unwrap();
    }

    pub async fn choose(&self, selector: &str, value: &str) {
        let select = self.client.find(Locator::Css(selector)).await.unwrap();
        select.select_by_label(value).await.unwrap();
    }

    /// Returns what the browser has written to its console since the last call.
    pub async fn console(&self) -> Vec<Value> {
        let entries = self.command("se/log", &json!({"type": "browser"})).await;
        entries.as_array().unwrap().clone()
    }

    /// Asserts that the console is empty.
    #[track_caller]
    pub fn console_is_empty(&self) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            let console = self.console().await;
            assert!(console.is_empty(), "{caller}: {console:#?}");
        }
    }

    /// Asserts that nothing is wider than the window and that axe-core has nothing to object to, in light and in dark, on
    /// a desktop and on a phone.
    #[track_caller]
    pub fn is_accessible(&self, state: &str) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            let axe = axe();
            for (width, height) in [(1280_u64, 1000), (375, 812), (320, 256)] {
                let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
                self.devtools("Emulation.setDeviceMetricsOverride", size).await;
                let wide = self.run("return document.documentElement.scrollWidth").await;
                assert!(wide.as_u64() <= Some(width), "{caller}: {state}: {wide} px wide at {width}");
                for scheme in ["light", "dark"] {
                    let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
                    self.devtools("Emulation.setEmulatedMedia", json!({"features": features})).await;
                    let Some(axe) = &axe else { continue };
                    let found = self.findings(axe).await;
                    assert_eq!(found, json!([]), "{caller}: {state}, {scheme}, {width} px");
                }
            }
            self.devtools("Emulation.setEmulatedMedia", json!({"features": []})).await;
            self.devtools("Emulation.clearDeviceMetricsOverride", json!({})).await;
        }
    }

    /// Returns what axe-core objects to: each rule, and the elements.
    async fn findings(&self, axe: &str) -> Value {
        if self.run("return !window.axe").await == true {
            self.run(axe).await;
        }
        self.run(
            "delete window.found;
             axe.run().then(({violations}) => {
                 window.found = violations.map(({id, nodes}) => [id, nodes.map(({target, failureSummary}) => [target, failureSummary])]);
             }, (error) => { window.found = String(error); });",
        )
        .await;
        let found = async || self.run("return window.found ?? null").await;
        eventually("axe has looked", found, |found| !found.is_null()).await
    }

    /// Sends a command of the DevTools protocol.
    pub async fn devtools(&self, name: &str, parameters: Value) -> Value {
        self.command("goog/cdp/execute", &json!({"cmd": name, "params": parameters})).await
    }

    /// Sends a command for which the client library has no call.
    async fn command(&self, path: &str, body: &Value) -> Value {
        let (agent, body) = (agent(), body.to_string());
        let url = format!("http://{}/session/{}/{path}", self.address, self.session);
        let asked = tokio::task::spawn_blocking(move || agent.post(&url).send(body)?.body_mut().read_to_string());
        let answer = asked.await.unwrap().unwrap_or_else(|error| panic!("{path}: {error}"));
        serde_json::from_str::<Value>(&answer).unwrap()["value"].take()
    }
}

/// The script of axe-core, if scripts/test could get it.
fn axe() -> Option<String> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), std::path::PathBuf::from);
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(target).join("axe-core/axe.min.js");
    let script = std::fs::read_to_string(&file);
    if script.is_err() {
        skipped(format_args!("{} is not there: contrast, names and roles on the page are not checked", file.display()));
    }
    script.ok()
}

fn agent() -> ureq::Agent {
    ureq::Agent::new_with_config(ureq::Agent::config_builder().proxy(None).timeout_global(Some(PATIENCE)).build())
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ending the session ends the browser, which is the driver's child and not ours.
        let _ = agent().delete(format!("http://{}/session/{}", self.address, self.session)).call();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
        let deadline = Instant::now() + PATIENCE;
        // The browser may still be writing its last files.
        while std::fs::remove_dir_all(self._profile.path()).is_err() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
    }
}
