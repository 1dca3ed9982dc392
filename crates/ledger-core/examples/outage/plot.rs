//! Plots as SVG: panels one below the other, with one legend.

use std::error::Error;
use std::path::Path;

use plotters::coord::ranged1d::Ranged;
use plotters::prelude::*;

use super::world::{Fault, Policy};
use super::{AGENTS, ROWS, Runs};

/// Told apart by people with any colour vision (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(213, 94, 0),
    RGBColor(150, 150, 150),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(0, 0, 0),
];
/// Lines that often lie below another are broader.
const WIDTHS: [u32; 6] = [5, 2, 2, 5, 2, 2];
const FONT: &str = "sans-serif";
const WIDTH: u32 = 920;
const PANEL: u32 = 270;
const HEAD: u32 = 78;
/// Below it an axis of powers of ten would have no end.
const LEAST: f64 = 0.001;

pub(super) type Failed = Box<dyn Error>;

pub(super) struct Line {
    pub(super) name: String,
    pub(super) colour: usize,
    pub(super) points: Vec<(f64, f64)>,
}

pub(super) struct Panel {
    pub(super) caption: String,
    pub(super) x_label: &'static str,
    pub(super) x: std::ops::Range<f64>,
    pub(super) top: f64,
    /// Both axes in powers of ten.
    pub(super) log: bool,
    /// The time of the fault.
    pub(super) shaded: Option<(f64, f64)>,
    pub(super) lines: Vec<Line>,
}

/// Draws `panels` with one legend: the lines of all panels are those of the first.
pub(super) fn draw(file: &Path, title: &str, panels: &[Panel]) -> Result<(), Failed> {
    let count = u32::try_from(panels.len())?;
    let root = SVGBackend::new(file, (WIDTH, HEAD + PANEL * count)).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(HEAD);
    head.draw(&Text::new(title.to_owned(), (14, 12), (FONT, 19)))?;
    legend(&head, &panels.first().ok_or("a plot has a panel")?.lines)?;
    for (area, panel) in body.split_evenly((panels.len(), 1)).iter().zip(panels) {
        let mut builder = ChartBuilder::on(area);
        builder
            .margin_left(8)
            .margin_right(26)
            .margin_bottom(4)
            .caption(&panel.caption, (FONT, 15))
            .x_label_area_size(40)
            .y_label_area_size(52);
        if panel.log {
            let x = panel.x.clone().log_scale();
            let chart = builder.build_cartesian_2d(x, (LEAST..panel.top).log_scale())?;
            fill(chart, panel, &|value| format!("{value}"))?;
        } else {
            let chart = builder.build_cartesian_2d(panel.x.clone(), 0.0..panel.top)?;
            fill(chart, panel, &|value| format!("{value:.1}"))?;
        }
    }
    root.present()?;
    Ok(())
}

fn fill<X, Y>(
    mut chart: ChartContext<'_, SVGBackend<'_>, Cartesian2d<X, Y>>,
    panel: &Panel,
    format: &dyn Fn(&f64) -> String,
) -> Result<(), Failed>
where
    X: Ranged<ValueType = f64> + plotters::coord::ranged1d::ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + plotters::coord::ranged1d::ValueFormatter<f64>,
{
    let whole = |value: &f64| format!("{value:.0}");
    chart
        .configure_mesh()
        .x_desc(panel.x_label)
        .x_labels(13)
        .y_labels(8)
        .max_light_lines(0)
        .x_label_formatter(&whole)
        .y_label_formatter(format)
        .label_style((FONT, 13))
        .axis_desc_style((FONT, 13))
        .draw()?;
    if let Some((from, until)) = panel.shaded {
        let bottom = if panel.log { LEAST } else { 0.0 };
        let band = Rectangle::new([(from, bottom), (until, panel.top)], BLACK.mix(0.08).filled());
        chart.draw_series([band])?;
    }
    let bottom = if panel.log { LEAST } else { 0.0 };
    for line in &panel.lines {
        let points = line.points.iter().map(|(x, y)| (*x, y.clamp(bottom, panel.top)));
        let style = COLOURS[line.colour].stroke_width(WIDTHS[line.colour]);
        chart.draw_series(LineSeries::new(points, style))?;
    }
    Ok(())
}

/// Names beside pieces of their lines, in rows of three.
fn legend(area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>, lines: &[Line]) -> Result<(), Failed> {
    for (place, line) in lines.iter().enumerate() {
        let (column, row) = (i32::try_from(place % 3)?, i32::try_from(place / 3)?);
        let (x, y) = (14 + column * 240, 46 + row * 18);
        let stroke = COLOURS[line.colour].stroke_width(WIDTHS[line.colour]);
        area.draw(&PathElement::new(vec![(x, y), (x + 24, y)], stroke))?;
        area.draw(&Text::new(line.name.clone(), (x + 31, y - 7), (FONT, 14)))?;
    }
    Ok(())
}

/// Load and goodput second by second, one file per fault.
pub(super) fn over_time(out: &Path, runs: &[Runs]) -> Result<(), Failed> {
    for fault in Fault::ALL {
        let of = |row: usize| runs.iter().find(|runs| runs.is(row, fault, 100, 1));
        let lines = |list: fn(&super::Record) -> &Vec<u32>| -> Vec<Line> {
            let line = |row: usize| {
                let records = &of(row)?.records;
                let sum = |second: usize, list: fn(&super::Record) -> &Vec<u32>| -> f64 {
                    records.iter().map(|record| f64::from(list(record)[second])).sum()
                };
                let seconds = 0..records.first()?.arrivals.len();
                let points = seconds.map(|second| {
                    (second as f64, sum(second, list) / sum(second, |record| &record.arrivals))
                });
                Some(Line { name: ROWS[row].short.into(), colour: row, points: points.collect() })
            };
            // Within slots, plain retries are the table's: here they would hide the others.
            (0..ROWS.len()).filter(|row| ROWS[*row].policy != Policy::SLOTS).filter_map(line).collect()
        };
        let span = fault.span();
        let panel = |caption: &str, top, lines| Panel {
            caption: caption.into(),
            x_label: "seconds",
            x: 0.0..240.0,
            top,
            log: false,
            shaded: Some((f64::from(span.from), f64::from(span.until))),
            lines,
        };
        let panels = [
            panel("calls at the backend per arrival", 7.0, lines(|record| &record.attempts)),
            panel("goodput per arrival", 1.5, lines(|record| &record.good)),
        ];
        let what = match fault {
            Fault::Down => "Fault A: every call fails for 60 s (shaded)",
            Fault::Slow => "Fault B: 40 % of the capacity for 20 s (shaded)",
        };
        let name = format!("{}.svg", fault.letter().to_lowercase());
        draw(&out.join(name), &format!("{what}; 1,000 arrivals/s, 100 agents"), &panels)?;
    }
    Ok(())
}

/// Amplification against the number of agents.
pub(super) fn over_agents(out: &Path, runs: &[Runs]) -> Result<(), Failed> {
    let panel = |fault: Fault| {
        let line = |row: usize| {
            let at = |agents: u32| runs.iter().find(|runs| runs.is(row, fault, agents, 1));
            let points =
                AGENTS.iter().filter_map(|agents| Some((f64::from(*agents), at(*agents)?.amplification())));
            Line { name: ROWS[row].short.into(), colour: row, points: points.collect() }
        };
        Panel {
            caption: format!(
                "fault {}: calls at the backend per arrival, from 2 s into the fault (0.001: that or less)",
                fault.letter()
            ),
            x_label: "agents",
            x: 10.0..1_000.0,
            top: 10.0,
            log: true,
            shaded: None,
            lines: (0..ROWS.len()).map(line).collect(),
        }
    };
    draw(
        &out.join("agents.svg"),
        "Amplification against the number of agents, 1,000 arrivals/s in all",
        &Fault::ALL.map(panel),
    )
}
