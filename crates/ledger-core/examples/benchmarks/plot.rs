//! The plots, as SVG.

use super::Failed;
use plotters::prelude::*;
use serde_json::Value;
use std::path::Path;

const SIZE: (u32, u32) = (760, 380);
const FONT: (&str, u32) = ("sans-serif", 16);
/// Told apart by people with any colour vision (Okabe and Ito).
const COLOURS: [RGBColor; 2] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0)];

struct Plot {
    file: &'static str,
    title: &'static str,
    x: &'static str,
    y: &'static str,
    /// The x axis in powers of ten.
    log: bool,
    lines: Vec<(&'static str, Vec<(f64, f64)>)>,
}

pub(super) fn all(curves: &Value, folder: &Path) -> Result<(), Failed> {
    let points = |name: &str, y: usize| -> Vec<(f64, f64)> {
        let rows = curves[name].as_array().into_iter().flatten();
        rows.filter_map(|row| Some((row[0].as_f64()?, row[y].as_f64()?))).collect()
    };
    let rate = "lifecycles/s";
    let plots = [
        Plot {
            file: "batch.svg",
            title: "Throughput by tasks a call, 16 callers",
            x: "tasks a call",
            y: rate,
            log: true,
            lines: vec![("", points("batch", 1))],
        },
        Plot {
            file: "callers.svg",
            title: "Throughput by callers, one task a call",
            x: "callers",
            y: rate,
            log: true,
            lines: vec![("", points("callers", 1))],
        },
        Plot {
            file: "load.svg",
            title: "From enqueue to start, by load",
            x: "tasks/s",
            y: "ms",
            log: true,
            lines: vec![("p50", points("load", 1)), ("p99", points("load", 2))],
        },
        Plot {
            file: "stored.svg",
            title: "Throughput by tasks that the ledger holds already",
            x: "tasks stored",
            y: rate,
            log: false,
            lines: vec![("", points("stored", 1))],
        },
    ];
    std::fs::create_dir_all(folder)?;
    plots.iter().try_for_each(|plot| draw(plot, folder))
}

fn draw(plot: &Plot, folder: &Path) -> Result<(), Failed> {
    let file = folder.join(plot.file);
    let root = SVGBackend::new(&file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let all = || plot.lines.iter().flat_map(|(_, points)| points);
    let top = all().map(|(_, y)| *y).fold(0.0, f64::max) * 1.1;
    let from = all().map(|(x, _)| *x).fold(f64::INFINITY, f64::min);
    let to = all().map(|(x, _)| *x).fold(0.0, f64::max);
    let mut builder = ChartBuilder::on(&root);
    builder.margin(12).caption(plot.title, FONT).x_label_area_size(44).y_label_area_size(70);
    macro_rules! fill {
        ($chart:expr) => {{
            let mut chart = $chart;
            chart
                .configure_mesh()
                .x_desc(plot.x)
                .y_desc(plot.y)
                .label_style(("sans-serif", 13))
                .x_label_formatter(&|x| format!("{x}"))
                .y_label_formatter(&|y| format!("{y}"))
                .light_line_style(WHITE)
                .draw()?;
            for ((name, points), colour) in plot.lines.iter().zip(COLOURS) {
                let line = LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(4);
                let drawn = chart.draw_series(line)?;
                if !name.is_empty() {
                    drawn.label(*name).legend(move |(x, y)| {
                        PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                    });
                }
            }
            if plot.lines.len() > 1 {
                let place = SeriesLabelPosition::UpperLeft;
                chart.configure_series_labels().position(place).label_font(FONT).draw()?;
            }
        }};
    }
    if plot.log {
        fill!(builder.build_cartesian_2d((from..to).log_scale(), 0.0..top)?);
    } else {
        fill!(builder.build_cartesian_2d(from..to, 0.0..top)?);
    }
    root.present()?;
    Ok(())
}
