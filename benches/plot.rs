//! Draws series as one SVG: a column for each, above the rate of a load, below the daemon's peak memory.
//!
//! It has no background, and its colours follow the reader's light or dark mode.

use std::fmt::Write;

pub struct Chart {
    /// Of what grows, to the right and logarithmically.
    pub title: &'static str,
    /// It, thousand rows a second, megabytes.
    pub points: Vec<(f64, f64, f64)>,
}

const WIDTH: f64 = 150.0;
const HEIGHT: f64 = 110.0;
/// Around each plot: for the labels.
const LEFT: f64 = 44.0;
const GAP: f64 = 46.0;
const TOP: f64 = 40.0;

const STYLE: &str = "text { font: 11px system-ui, sans-serif; fill: #57606a } .title { font-size: 12px; fill: #1f2328 } \
     .tick { font-size: 10px } .axis { stroke: #8c959f; fill: none } .grid { stroke: #8c959f; stroke-opacity: .3 } \
     .rate { stroke: #0969da; fill: #0969da } .memory { stroke: #bc4c00; fill: #bc4c00 } polyline { fill: none; stroke-width: 2 } \
     polyline.rate, polyline.memory { fill: none } \
     @media (prefers-color-scheme: dark) { text { fill: #9198a1 } .title { fill: #f0f6fc } \
     .rate { stroke: #4493f8; fill: #4493f8 } .memory { stroke: #f0883e; fill: #f0883e } polyline.rate, polyline.memory { fill: none } }";

pub fn svg(charts: &[Chart]) -> String {
    let width = LEFT + charts.len() as f64 * (WIDTH + GAP);
    let height = TOP + 2.0 * (HEIGHT + GAP);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         role=\"img\" aria-label=\"Rate of a first load and peak memory, by what grows\">\n<style>{STYLE}</style>\n"
    );
    for (column, chart) in charts.iter().enumerate() {
        let x = LEFT + column as f64 * (WIDTH + GAP);
        let rates = chart.points.iter().map(|(count, rate, _)| (*count, *rate)).collect::<Vec<_>>();
        let memory = chart.points.iter().map(|(count, _, memory)| (*count, *memory)).collect::<Vec<_>>();
        plot(&mut text, (x, TOP), "rate", &rates);
        plot(&mut text, (x, TOP + HEIGHT + GAP), "memory", &memory);
        label(&mut text, (x + WIDTH / 2.0, TOP + 2.0 * HEIGHT + GAP + 34.0), "middle", "title", chart.title);
    }
    label(&mut text, (4.0, 16.0), "start", "title", "First load: thousand rows a second");
    label(&mut text, (4.0, TOP + HEIGHT + GAP - 12.0), "start", "title", "Peak memory of prefetchd, MB");
    text + "</svg>\n"
}

/// With the upper left corner at this point.
fn plot(text: &mut String, (x, y): (f64, f64), class: &str, points: &[(f64, f64)]) {
    let most = round_up(points.iter().map(|(_, value)| *value).fold(0.0, f64::max));
    let (first, last) = (points.first().map_or(1.0, |point| point.0), points.last().map_or(1.0, |point| point.0));
    let across = |count: f64| x + 8.0 + (count / first).log10() / (last / first).log10().max(0.1) * (WIDTH - 16.0);
    let down = |value: f64| y + HEIGHT * (1.0 - value / most);
    for part in [0.5, 1.0] {
        let at = down(most * part);
        let _ = writeln!(
            text,
            "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\"/>",
            x + WIDTH
        );
    }
    for part in [0.0, 0.5, 1.0] {
        label(text, (x - 6.0, down(most * part) + 4.0), "end", "tick", &short(most * part));
    }
    let _ = writeln!(
        text,
        "<polyline class=\"axis\" points=\"{x:.1},{y:.1} {x:.1},{0:.1} {1:.1},{0:.1}\"/>",
        y + HEIGHT,
        x + WIDTH
    );
    let line: String =
        points.iter().map(|(count, value)| format!("{:.1},{:.1} ", across(*count), down(*value))).collect();
    let _ = writeln!(text, "<polyline class=\"{class}\" points=\"{}\"/>", line.trim_end());
    let mut free = f64::MIN;
    for (count, value) in points {
        let at = across(*count);
        let _ = writeln!(text, "<circle class=\"{class}\" cx=\"{at:.1}\" cy=\"{:.1}\" r=\"2.5\"/>", down(*value));
        let name = short(*count);
        // As many labels as there is space for.
        if at - free > 3.3 * name.len() as f64 {
            label(text, (at, y + HEIGHT + 15.0), "middle", "tick", &name);
            free = at + 3.3 * name.len() as f64;
        }
    }
}

fn label(text: &mut String, (x, y): (f64, f64), anchor: &str, class: &str, what: &str) {
    let _ = writeln!(text, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>");
}

/// To 1, 2 or 5 times a power of ten.
fn round_up(value: f64) -> f64 {
    let power = 10_f64.powf(value.max(1.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|times| times * power).into_iter().find(|round| *round >= value).unwrap_or(value)
}

fn short(value: f64) -> String {
    match value {
        1e6.. => format!("{} M", value / 1e6),
        1e3.. => format!("{} k", value / 1e3),
        _ => value.to_string(),
    }
}
