//! Which of an index's images runs here: the operating system, the architecture and its variant.

use serde::Deserialize;

/// A platform as manifests write it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) variant: Option<String>,
}

/// What this machine runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Host {
    architecture: &'static str,
    /// The level of the x86-64 psABI, or the version of the Arm architecture.
    level: u8,
}

impl Host {
    /// The machine that we run on.
    pub(crate) fn detect() -> Host {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Host { architecture, level: level() }
    }

    /// For error messages.
    pub(crate) fn name(&self) -> String {
        format!("linux/{}", self.architecture)
    }

    /// How well an image suits: `None` if it does not run here, else higher is better.
    pub(crate) fn suits(&self, platform: &Platform) -> Option<u8> {
        if platform.os != "linux" || normal(&platform.architecture) != self.architecture {
            return None;
        }
        let variant = platform.variant.as_deref().unwrap_or_default();
        let level = match variant {
            // No variant is the lowest of amd64, and v8 of arm64.
            "" if self.architecture == "arm64" => 8,
            "" => 1,
            other => other.strip_prefix('v').unwrap_or(other).split('.').next()?.parse().ok()?,
        };
        (level <= self.level).then_some(level)
    }

    /// Whether a configuration, which may leave these fields out, is for this machine.
    pub(crate) fn runs(&self, os: &str, architecture: &str) -> bool {
        (os.is_empty() || os == "linux")
            && (architecture.is_empty() || normal(architecture) == self.architecture)
    }
}

/// Names that builders use for the same thing.
fn normal(architecture: &str) -> &str {
    match architecture {
        "x86_64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        "i386" => "386",
        other => other,
    }
}

#[cfg(target_arch = "x86_64")]
fn level() -> u8 {
    use std::arch::is_x86_feature_detected as has;
    let v2 = has!("popcnt") && has!("sse3") && has!("ssse3") && has!("sse4.1") && has!("sse4.2");
    let v3 = v2
        && has!("avx")
        && has!("avx2")
        && has!("bmi1")
        && has!("bmi2")
        && has!("f16c")
        && has!("fma")
        && has!("lzcnt")
        && has!("movbe");
    let v4 =
        v3 && has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
    1 + u8::from(v2) + u8::from(v3) + u8::from(v4)
}

#[cfg(target_arch = "aarch64")]
fn level() -> u8 {
    // v9 is a superset of v8, but nothing in user space says which one this is.
    8
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn level() -> u8 {
    u8::MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(architecture: &str, variant: &str) -> Platform {
        let variant = (!variant.is_empty()).then(|| variant.to_owned());
        Platform { os: "linux".into(), architecture: architecture.into(), variant }
    }

    #[test]
    fn the_best_variant_that_the_machine_has_wins() {
        let host = Host { architecture: "amd64", level: 3 };
        assert!(host.suits(&platform("amd64", "v3")) > host.suits(&platform("amd64", "")));
        assert_eq!(host.suits(&platform("amd64", "v4")), None);
        assert_eq!(host.suits(&platform("arm64", "v8")), None);
        assert_eq!(host.suits(&platform("x86_64", "")), Some(1));
        assert_eq!(host.suits(&Platform { os: "windows".into(), ..platform("amd64", "") }), None);
        assert_eq!(host.suits(&Platform { os: "unknown".into(), ..platform("unknown", "") }), None);
    }

    #[test]
    fn arm64_takes_v8_and_no_variant_alike() {
        let host = Host { architecture: "arm64", level: 8 };
        assert_eq!(host.suits(&platform("arm64", "v8")), host.suits(&platform("arm64", "")));
        assert_eq!(host.suits(&platform("arm64", "v9")), None);
        assert_eq!(host.suits(&platform("aarch64", "v8")), Some(8));
    }

    #[test]
    fn odd_variants_do_not_run_and_do_not_panic() {
        let host = Host { architecture: "amd64", level: 4 };
        for odd in ["v", "vv", "v999", "x", "v-1", "\u{fe0f}"] {
            assert_eq!(host.suits(&platform("amd64", odd)), None, "{odd}");
        }
    }
}
