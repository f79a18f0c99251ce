//! Sizes, durations and shares as people write them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::Malformed;

/// A number of bytes, read from `64MB` or `1GB` (powers of 1024, PostgreSQL's own units, manual section 20.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<ByteSize, Malformed> {
        let malformed = || Malformed::new("size", text, "a whole number and B, kB, MB, GB or TB, such as 64MB");
        let (number, unit) = number_and_unit(text).ok_or_else(malformed)?;
        let shift = match unit {
            "" | "B" => 0,
            "kB" | "KB" => 10,
            "MB" => 20,
            "GB" => 30,
            "TB" => 40,
            _ => return Err(malformed()),
        };
        number.checked_mul(1 << shift).map(ByteSize).ok_or_else(malformed)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&human_bytes(self.0))
    }
}

/// `1.5 GB`: three figures are enough for a person. Powers of 1024.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} bytes"),
        _ if value < 10.0 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

/// A duration such as `0`, `500ms`, `1s`, `5m`, `12h` or `7d`.
pub fn parse_duration(text: &str) -> Result<Duration, Malformed> {
    let malformed = || Malformed::new("duration", text, "a whole number and ms, s, m, h or d, such as 60s");
    let (number, unit) = number_and_unit(text).ok_or_else(malformed)?;
    let seconds = match unit {
        "ms" => return Ok(Duration::from_millis(number)),
        "" if number == 0 => 1,
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(malformed()),
    };
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(malformed)
}

/// A share of a whole, read from `5%` or `0.5%`: more than nothing, at most all of it. In hundredths of a percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share(u32);

impl Share {
    const ALL: u32 = 10_000;

    /// Into how many parts a whole is cut so that none is larger than this share.
    pub fn parts(self) -> u32 {
        Share::ALL.div_ceil(self.0)
    }
}

impl FromStr for Share {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Share, Malformed> {
        let malformed =
            || Malformed::new("share", text, "a percentage above 0% and up to 100%, such as 5% (two decimals at most)");
        let number = text.trim().strip_suffix('%').map(str::trim_end).ok_or_else(malformed)?;
        let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
        let is_number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || !is_number(whole) || !is_number(decimals) || decimals.len() > 2 {
            return Err(malformed());
        }
        let hundredths: u32 = format!("{whole}{decimals:0<2}").parse().map_err(|_| malformed())?;
        if (1..=Share::ALL).contains(&hundredths) { Ok(Share(hundredths)) } else { Err(malformed()) }
    }
}

fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number = text[..digits].parse().ok()?;
    Some((number, text[digits..].trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_need_units_we_know() {
        assert_eq!("64MB".parse(), Ok(ByteSize(64 << 20)));
        assert_eq!("1 GB".parse(), Ok(ByteSize(1 << 30)));
        assert!("1.5GB".parse::<ByteSize>().is_err());
        assert!("99999999999TB".parse::<ByteSize>().is_err());
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        for bad in ["5", "m", "-1s", "1w", "99999999999999999999d"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_share_says_into_how_many_parts_a_whole_is_cut() {
        let parts = |text: &str| text.parse::<Share>().map(Share::parts);
        for (text, expected) in
            [("5%", 20), ("100%", 1), ("60%", 2), ("30 %", 4), ("0.5%", 200), ("12.5%", 8), ("0.01%", 10_000)]
        {
            assert_eq!(parts(text), Ok(expected), "{text}");
        }
        for bad in ["0%", "5", "101%", "-5%", "0.001%", ".5%", "%", "", "5%%", "+5%", "99999999999%"] {
            assert!(parts(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn bytes_for_people() {
        assert_eq!(human_bytes(0), "0 bytes");
        assert_eq!(human_bytes(1536), "1.5 kB");
        assert_eq!(human_bytes(110 << 20), "110 MB");
    }
}
