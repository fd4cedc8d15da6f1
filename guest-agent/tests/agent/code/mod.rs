//! CodeService.

mod charts;
mod contexts;
mod limits;
mod others;
mod python;
