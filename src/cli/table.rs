//! Tables for people: columns as wide as their widest cell, two spaces between.
//!
//! Why: columns that line up are read at a glance.
//! Never: prints a control character.

use super::output::printable;

/// Rows under a heading.
#[derive(Clone, Debug)]
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(|&cell| cell.to_owned()).collect()] }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells.iter().map(|c| printable(c).replace('\n', " ")).collect());
    }

    /// The lines, each without trailing spaces.
    pub(super) fn lines(&self) -> Vec<String> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let mut text = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                text.push_str(&format!("{cell:<width$}  "));
            }
            text.trim_end().to_owned()
        };
        self.rows.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_control_characters_are_gone() {
        let mut table = Table::new(&["A", "BB"]);
        table.row(vec!["long".into(), "x\x1b[31m".into()]);
        table.row(vec!["b".into(), "\u{202e}gmi".into()]);
        assert_eq!(table.lines(), ["A     BB", "long  x\u{fffd}[31m", "b     \u{fffd}gmi"]);
    }
}
