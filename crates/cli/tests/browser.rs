//! The report page in a real browser: no error on its console, nothing fetched, nothing to scroll sideways on a phone.
//! Ignored where there is no Chromium.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{MIXTURE, STORIES, Temp, overspill};
use libtest_mimic::{Arguments, Failed, Trial};
use std::path::Path;
use std::process::{Command, Stdio};

fn main() -> std::process::ExitCode {
    let browser = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(|name| {
        let found = Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        found.is_ok_and(|status| status.success())
    });
    let name = browser.unwrap_or("none");
    let trial = Trial::test("the_report_fits_every_screen", move || check(name)).with_ignored_flag(browser.is_none());
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code()
}

/// Looks at the page within a frame of each width, where the style sheet's media queries see that width.
fn check(browser: &str) -> Result<(), Failed> {
    let temp = Temp::new();
    let page = temp.join("page.html");
    let sweep =
        ["bench", STORIES, MIXTURE, "--device", "cpu", "--ram", "60%,100%", "--evict", "lru,planned", "-r", "2"];
    let short = ["--probe-seconds", "0.05", "--prompt-tokens", "3", "-n", "5", "--report", page.to_str().unwrap()];
    overspill(&[&sweep[..], &short].concat()).ok();
    let html = std::fs::read_to_string(&page).unwrap();
    let inner = html.replace('&', "&amp;").replace('"', "&quot;");
    let frames: String = [320, 390, 768, 1280]
        .map(|width| format!("<iframe width={width} height=900 srcdoc=\"{inner}\"></iframe>"))
        .concat();
    let measure = "<script>onload=()=>{document.body.dataset.found=[...document.querySelectorAll('iframe')].map(f=>{\
        const d=f.contentDocument,w=f.contentWindow;return [w.innerWidth,d.documentElement.scrollWidth,\
        w.performance.getEntriesByType('resource').length,d.querySelectorAll('svg').length,\
        Math.min(...[...d.querySelectorAll('.chart text')].map(t=>t.getBoundingClientRect().height))].join(' ')}).join(';')}</script>";
    let wrapper = temp.join("wrapper.html");
    std::fs::write(&wrapper, format!("<!doctype html><meta charset=utf-8><body>{frames}{measure}")).unwrap();
    let (dom, log) = open(browser, temp.path(), &wrapper);
    let found = dom.split("data-found=\"").nth(1).and_then(|rest| rest.split('"').next());
    let found = found.ok_or_else(|| Failed::from(format!("nothing was measured: {dom:.300}\n{log}")))?;
    assert_eq!(found.split(';').count(), 4, "{found}");
    for frame in found.split(';') {
        let numbers: Vec<f64> = frame.split(' ').map(|number| number.parse().unwrap()).collect();
        let [width, scroll_width, fetched, drawings, text_height] = numbers[..] else { panic!("{found}") };
        assert!(scroll_width <= width, "at {width} the page is {scroll_width} wide");
        assert_eq!(fetched, 0.0, "something was fetched");
        assert!(drawings > 10.0, "there are charts");
        assert!(text_height >= 10.0, "at {width} the smallest text is {text_height} high");
    }
    assert!(!log.contains("CONSOLE"), "the console is empty: {log}");
    Ok(())
}

/// The document after its scripts have run, and the browser's log.
fn open(browser: &str, home: &Path, page: &Path) -> (String, String) {
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"])
        .args(["--virtual-time-budget=5000", "--window-size=1400,1000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", home.join("profile").display()))
        .arg(format!("file://{}", page.display()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}
