//! Reads what plugins answer to ADD, in every version of the format, and rewrites it for the next plugin in line.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::conf::Version;

/// Reads an answer and brings it to the version that the network speaks.
pub(crate) fn parse(bytes: &[u8], wanted: Version) -> Result<Value, String> {
    let value: Value = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let Value::Object(all) = value else { return Err("not a JSON object".into()) };
    convert(all, wanted)
}

/// Rewrites a result in another version of the format. Fields that we do not know are kept.
pub(crate) fn convert(all: Map<String, Value>, wanted: Version) -> Result<Value, String> {
    let given = match all.get("cniVersion").and_then(Value::as_str).filter(|v| !v.is_empty()) {
        Some(text) => Version::parse(text).ok_or_else(|| format!("unknown CNI version {text:?}"))?,
        None if all.contains_key("ip4") || all.contains_key("ip6") => {
            Version::parse("0.2.0").unwrap_or(wanted)
        }
        None => wanted,
    };
    let mut all = if given < Version::V0_3_0 && wanted >= Version::V0_3_0 {
        raise(all)?
    } else if given >= Version::V0_3_0 && wanted < Version::V0_3_0 {
        lower(all)?
    } else {
        all
    };
    let ips = match all.get_mut("ips") {
        None | Some(Value::Null) => &mut Vec::new(),
        Some(Value::Array(ips)) => ips,
        Some(_) => return Err("ips is not a list".into()),
    };
    for ip in ips {
        let address = address(ip)?;
        let Some(ip) = ip.as_object_mut() else { continue };
        if wanted >= Version::V1_0_0 {
            ip.remove("version");
        } else {
            ip.insert("version".into(), json!(if address.is_ipv4() { "4" } else { "6" }));
        }
    }
    all.insert("cniVersion".into(), json!(wanted.as_str()));
    Ok(Value::Object(all))
}

/// What the pod got, out of a result of version 0.3 or later.
pub(crate) struct Facts {
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) mac: String,
}

impl Facts {
    /// Addresses of the pod's own interface, in the plugins' order.
    pub(crate) fn of(result: &Value, interface: &str) -> Result<Facts, String> {
        let list =
            |key: &str| result.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let interfaces = list("interfaces");
        let text = |i: usize, key: &str| interfaces.get(i)?.get(key)?.as_str();
        let ours = |i: usize| {
            text(i, "name") == Some(interface)
                && text(i, "sandbox").is_some_and(|sandbox| !sandbox.is_empty())
        };
        let mac = (0..interfaces.len()).find(|i| ours(*i)).and_then(|i| text(i, "mac")).unwrap_or_default();
        let (mut own, mut all) = (Vec::new(), Vec::new());
        for ip in list("ips") {
            let address = address(ip)?;
            let index = ip.get("interface").and_then(Value::as_u64).map(|i| i as usize);
            if index.is_some_and(ours) {
                own.push(address);
            }
            // Addresses of the bridge and of the host's side of the wire are listed as well, with their interface.
            if index.is_none_or(|i| text(i, "sandbox").is_some_and(|sandbox| !sandbox.is_empty())) {
                all.push(address);
            }
        }
        Ok(Facts { ips: if own.is_empty() { all } else { own }, mac: mac.to_owned() })
    }
}

fn address(ip: &Value) -> Result<IpAddr, String> {
    let text = ip.get("address").and_then(Value::as_str).ok_or("an entry of ips without address")?;
    let bare = text.split_once('/').map_or(text, |(bare, _)| bare);
    bare.parse().map_err(|_| format!("{text:?} is not an address"))
}

/// From `ip4` and `ip6` (0.1, 0.2) to `ips` and `routes`.
fn raise(mut all: Map<String, Value>) -> Result<Map<String, Value>, String> {
    let (mut ips, mut routes) = (Vec::new(), Vec::new());
    for key in ["ip4", "ip6"] {
        let Some(Value::Object(old)) = all.remove(key) else { continue };
        let mut ip = Map::new();
        ip.insert("address".into(), old.get("ip").cloned().ok_or_else(|| format!("{key} without ip"))?);
        if let Some(gateway) = old.get("gateway") {
            ip.insert("gateway".into(), gateway.clone());
        }
        ips.push(Value::Object(ip));
        if let Some(Value::Array(more)) = old.get("routes") {
            routes.extend(more.iter().cloned());
        }
    }
    all.insert("ips".into(), Value::Array(ips));
    if !routes.is_empty() {
        all.insert("routes".into(), Value::Array(routes));
    }
    Ok(all)
}

/// The way back. Of each family only the first address fits.
fn lower(mut all: Map<String, Value>) -> Result<Map<String, Value>, String> {
    let ips = all.remove("ips");
    let routes = all.remove("routes");
    all.remove("interfaces");
    for ip in ips.as_ref().and_then(Value::as_array).into_iter().flatten() {
        let is_ipv4 = address(ip)?.is_ipv4();
        let key = if is_ipv4 { "ip4" } else { "ip6" };
        if all.contains_key(key) {
            continue;
        }
        let mut old = Map::new();
        old.insert("ip".into(), ip.get("address").cloned().unwrap_or_default());
        if let Some(gateway) = ip.get("gateway") {
            old.insert("gateway".into(), gateway.clone());
        }
        let fits = |route: &&Value| {
            route.get("dst").and_then(Value::as_str).is_some_and(|dst| dst.contains(':') != is_ipv4)
        };
        let own: Vec<Value> =
            routes.as_ref().and_then(Value::as_array).into_iter().flatten().filter(fits).cloned().collect();
        if !own.is_empty() {
            old.insert("routes".into(), Value::Array(own));
        }
        all.insert(key.into(), Value::Object(old));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn version(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    fn read(text: &str, wanted: &str) -> Value {
        parse(text.as_bytes(), version(wanted)).unwrap()
    }

    #[test]
    fn a_result_of_the_first_days_becomes_a_modern_one() {
        let old = r#"{"cniVersion":"0.2.0","ip4":{"ip":"10.1.0.5/16","gateway":"10.1.0.1","routes":[{"dst":"0.0.0.0/0"}]},"ip6":{"ip":"fd00::5/64"},"dns":{"nameservers":["1.1.1.1"]}}"#;
        let new = read(old, "1.0.0");
        assert_eq!(
            new,
            json!({"cniVersion":"1.0.0","ips":[{"address":"10.1.0.5/16","gateway":"10.1.0.1"},{"address":"fd00::5/64"}],
                   "routes":[{"dst":"0.0.0.0/0"}],"dns":{"nameservers":["1.1.1.1"]}})
        );
        let Facts { ips, mac } = Facts::of(&new, "eth0").unwrap();
        assert_eq!(ips, ["10.1.0.5".parse::<IpAddr>().unwrap(), "fd00::5".parse().unwrap()]);
        assert_eq!(mac, "");
    }

    #[test]
    fn results_between_0_3_and_1_1_differ_in_the_address_family_only() {
        let middle = r#"{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","mac":"aa:bb","sandbox":"/n"}],"ips":[{"version":"4","address":"10.1.0.5/16","interface":0}]}"#;
        let new = read(middle, "1.1.0");
        assert_eq!(new["ips"], json!([{"address":"10.1.0.5/16","interface":0}]));
        assert_eq!(new["cniVersion"], "1.1.0");
        let back = read(&new.to_string(), "0.3.1");
        assert_eq!(back["ips"], json!([{"version":"4","address":"10.1.0.5/16","interface":0}]));
    }

    #[test]
    fn a_modern_result_is_lowered_for_an_old_network() {
        let new = r#"{"cniVersion":"1.0.0","interfaces":[],"ips":[{"address":"10.1.0.5/16","gateway":"10.1.0.1"},{"address":"10.1.0.6/16"},{"address":"fd00::5/64"}],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}"#;
        let old = read(new, "0.2.0");
        assert_eq!(
            old,
            json!({"cniVersion":"0.2.0","ip4":{"ip":"10.1.0.5/16","gateway":"10.1.0.1","routes":[{"dst":"0.0.0.0/0"}]},
                   "ip6":{"ip":"fd00::5/64","routes":[{"dst":"::/0"}]}})
        );
    }

    #[test]
    fn addresses_of_the_bridge_are_not_the_pods() {
        let result = json!({
            "interfaces": [{"name":"cni0","mac":"01"},{"name":"veth1","mac":"02"},{"name":"eth0","mac":"03","sandbox":"/n"}],
            "ips": [{"address":"10.1.0.1/16","interface":0},{"address":"10.1.0.5/16","interface":2},{"address":"10.9.0.5/16"}]
        });
        let Facts { ips, mac } = Facts::of(&result, "eth0").unwrap();
        assert_eq!(ips, ["10.1.0.5".parse::<IpAddr>().unwrap()]);
        assert_eq!(mac, "03");
        let Facts { ips, .. } = Facts::of(&result, "net1").unwrap();
        assert_eq!(ips.len(), 2, "addresses without an interface, or of another one inside");
    }

    #[test]
    fn garbage_is_refused() {
        for text in [
            "",
            "null",
            "[]",
            r#"{"cniVersion":"9.0.0"}"#,
            r#"{"ips":5}"#,
            r#"{"ips":[{}]}"#,
            r#"{"ips":[{"address":"nonsense"}]}"#,
            r#"{"ips":[7]}"#,
            r#"{"cniVersion":"0.2.0","ip4":{}}"#,
        ] {
            assert!(parse(text.as_bytes(), version("1.0.0")).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_result_can_panic_us(text in r#"[\{\}\[\]":,a-z0-9\./ips]{0,80}"#, to in 0usize..7) {
            let wanted = version(["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"][to]);
            if let Ok(value) = parse(text.as_bytes(), wanted) {
                let _ = Facts::of(&value, "eth0");
            }
        }
    }
}
