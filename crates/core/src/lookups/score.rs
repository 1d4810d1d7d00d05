//! The score of a row in a sorted set: a number for the text of its order column.

use std::fmt;

/// Never NaN, and zero has no sign, so that equal scores are those that Redis cannot tell apart.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
pub struct Score(f64);

impl Eq for Score {}

/// What comes last: NULL, NaN, and what is no number and no time.
const LAST: Score = Score(f64::INFINITY);

impl Score {
    fn new(number: f64) -> Self {
        match number {
            number if number.is_nan() => LAST,
            // Also minus zero.
            0.0 => Score(0.0),
            number => Score(number),
        }
    }

    /// Returns the score of a field's value: numbers as they are, `true` and `false` as 1 and 0, dates and timestamps as
    /// seconds since 1970 in UTC.
    pub fn of(text: &[u8]) -> Self {
        match text {
            b"true" => return Score(1.0),
            b"false" => return Score(0.0),
            b"Infinity" | b"infinity" => return LAST,
            b"-Infinity" | b"-infinity" => return Score(f64::NEG_INFINITY),
            _ => {}
        }
        let Ok(text) = std::str::from_utf8(text) else { return LAST };
        let is_number = text.strip_prefix('-').unwrap_or(text).starts_with(|c: char| c.is_ascii_digit());
        match text.parse() {
            Ok(number) if is_number => Score::new(number),
            _ => seconds(text).map_or(LAST, Score::new),
        }
    }

    /// The score of a row whose order column is NULL.
    pub fn of_null() -> Self {
        LAST
    }

    /// Reads a score as Redis writes it.
    pub fn read(text: &[u8]) -> Option<Self> {
        let number: f64 = std::str::from_utf8(text).ok()?.parse().ok()?;
        (!number.is_nan()).then_some(Score::new(number))
    }
}

impl fmt::Display for Score {
    /// As Redis reads it: short, and without loss.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            f64::INFINITY => f.write_str("+inf"),
            f64::NEG_INFINITY => f.write_str("-inf"),
            number if number == 0.0 || (1e-5..1e15).contains(&number.abs()) => write!(f, "{number}"),
            number => write!(f, "{number:e}"),
        }
    }
}

impl fmt::Debug for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Returns the seconds since 1970 of `2026-11-30`, `2026-11-30 05:44:00.25`, `2026-11-30 05:44:00+00` or one of these with
/// ` BC`, or with a `T` in place of the space, as in documents.
fn seconds(text: &str) -> Option<f64> {
    let (text, is_bc) = text.strip_suffix(" BC").map_or((text, false), |text| (text, true));
    let (date, time) = text.split_once([' ', 'T']).map_or((text, None), |(date, time)| (date, Some(time)));
    let mut parts = date.split('-');
    let mut part = || parts.next().filter(|part| part.bytes().all(|b| b.is_ascii_digit()))?.parse::<i64>().ok();
    let (year, month, day) = (part()?, part()?, part()?);
    if parts.next().is_some() || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let days = days_since_1970(if is_bc { 1 - year } else { year }, month, day);
    let micros = i128::from(days) * 86_400_000_000 + time.map_or(Some(0), micros_of_day)?;
    // The nearest double, for two centuries around 1970 and more.
    Some(micros as f64 / 1e6)
}

/// A time of day in microseconds, with or without an offset from UTC, which is taken off.
fn micros_of_day(text: &str) -> Option<i128> {
    let at = text.find(['+', '-']).unwrap_or(text.len());
    let (time, offset) = text.split_at(at);
    let offset = match offset.split_at_checked(1) {
        None => 0,
        Some(("-", offset)) => -sexagesimal(offset)?,
        Some((_, offset)) => sexagesimal(offset)?,
    };
    Some(sexagesimal(time)? - offset)
}

/// Hours, minutes and seconds in microseconds; whatever is left out is 0.
fn sexagesimal(text: &str) -> Option<i128> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let mut micros = 0;
    for (part, unit) in whole.split(':').zip([3_600_000_000, 60_000_000, 1_000_000]) {
        micros += digits(part)? * unit;
    }
    // Postgres prints at most six digits.
    let fraction = format!("{fraction:0<6}");
    Some(micros + digits(fraction.get(..6)?)?)
}

fn digits(text: &str) -> Option<i128> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Days from 1970-01-01, in the Gregorian calendar before it was introduced, too, as Postgres counts.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    // Years that begin in March, so that the leap day is their last.
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::POSTGRES_EPOCH_SECONDS;

    #[test]
    fn a_score_is_the_value_as_a_number() {
        for (text, score) in [
            ("0", 0.0),
            ("-0", 0.0),
            ("42", 42.0),
            ("-1.50", -1.5),
            ("1e+300", 1e300),
            ("9223372036854775807", 9_223_372_036_854_775_807.0),
            ("true", 1.0),
            ("false", 0.0),
            ("Infinity", f64::INFINITY),
            ("-infinity", f64::NEG_INFINITY),
            ("NaN", f64::INFINITY),
            ("", f64::INFINITY),
            ("a text", f64::INFINITY),
            ("inf", f64::INFINITY),
            ("1970-01-01", 0.0),
            ("2000-01-01", POSTGRES_EPOCH_SECONDS as f64),
            ("2024-02-29", 1_709_164_800.0),
            ("1969-12-31 23:59:59.5", -0.5),
            ("2026-11-30 06:53:52.769059+00", 1_796_021_632.769_059),
            ("2026-11-30 05:44:00.25+00", 1_796_017_440.25),
            ("2026-11-30T05:44:00.25", 1_796_017_440.25),
            ("2026-11-30T05:44:00.25+00:00", 1_796_017_440.25),
            ("0001-12-31T00:00:00+00:00 BC", -62_135_596_800.0 - 86_400.0),
            ("2026-11-30 05:44:00+05:30", 1_795_997_640.0),
            ("2026-11-30 05:44:00-08", 1_796_046_240.0),
            ("0001-12-31 BC", -62_135_596_800.0 - 86_400.0),
            ("0001-01-01", -62_135_596_800.0),
            ("294276-12-31 23:59:59", 9_224_318_015_999.0),
            ("2026-13-01", f64::INFINITY),
        ] {
            assert_eq!(Score::of(text.as_bytes()), Score(score), "{text}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for number in
            [0.0, 1.0, -0.1, 1e300, 5e-324, 1_796_017_440.25, 9_007_199_254_740_993.0, f64::INFINITY, f64::NEG_INFINITY]
        {
            let score = Score::new(number);
            assert_eq!(Score::read(score.to_string().as_bytes()), Some(score), "{score}");
        }
        assert_eq!([1e-300, -1e-5, 1e15].map(|number| Score::new(number).to_string()), ["1e-300", "-0.00001", "1e15"]);
        for (text, score) in [("inf", f64::INFINITY), ("-inf", f64::NEG_INFINITY), ("1e+300", 1e300), ("-0", 0.0)] {
            assert_eq!(Score::read(text.as_bytes()), Some(Score(score)));
        }
        assert_eq!(Score::read(b"nan"), None);
    }
}
