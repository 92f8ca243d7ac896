//! A range of addresses: which are in it, which one is whose.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Host parts are counted up to this many bits; a larger IPv6 subnet is used from its beginning.
const MAX_HOST_BITS: u32 = 20;

/// A subnet in canonical form: the bits behind the prefix are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    address: IpAddr,
    prefix: u8,
}

impl Subnet {
    /// Its first address, which names the subnet.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// How many bits are the same in all its addresses.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The bridge's own address: the first that a host can have.
    pub fn gateway(&self) -> IpAddr {
        self.nth(1)
    }

    /// Whether it has that address.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.address, ip) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => net.to_bits() == ip.to_bits() & mask4(self.prefix),
            (IpAddr::V6(net), IpAddr::V6(ip)) => net.to_bits() == ip.to_bits() & mask6(self.prefix),
            _ => false,
        }
    }

    /// Whether an address is in both.
    pub fn overlaps(&self, other: &Subnet) -> bool {
        self.contains(other.address) || other.contains(self.address)
    }

    /// How many addresses pods can have: all but the network's, the gateway's and the broadcast address.
    pub(crate) fn pods(&self) -> u32 {
        let bits = match self.address {
            IpAddr::V4(_) => 32 - u32::from(self.prefix),
            IpAddr::V6(_) => 128 - u32::from(self.prefix),
        };
        (1u32 << bits.min(MAX_HOST_BITS)).saturating_sub(3)
    }

    /// The pod address with a number below [`Subnet::pods`].
    pub(crate) fn pod(&self, number: u32) -> IpAddr {
        self.nth(number + 2)
    }

    pub(crate) fn is_ipv4(&self) -> bool {
        self.address.is_ipv4()
    }

    /// The netmask as it stands in a packet.
    pub(crate) fn mask(&self) -> Vec<u8> {
        match self.address {
            IpAddr::V4(_) => mask4(self.prefix).to_be_bytes().to_vec(),
            IpAddr::V6(_) => mask6(self.prefix).to_be_bytes().to_vec(),
        }
    }

    fn nth(&self, offset: u32) -> IpAddr {
        match self.address {
            IpAddr::V4(net) => Ipv4Addr::from_bits(net.to_bits().wrapping_add(offset)).into(),
            IpAddr::V6(net) => Ipv6Addr::from_bits(net.to_bits().wrapping_add(u128::from(offset))).into(),
        }
    }
}

/// Reads one subnet, or two with a comma between.
pub(crate) fn list(text: &str) -> Result<Vec<Subnet>, Error> {
    let subnets: Vec<Subnet> = text.split(',').map(|part| part.trim().parse()).collect::<Result<_, _>>()?;
    if subnets.len() > 2 {
        return Err(Error::Config(format!("more than two subnets in {text:?}")));
    }
    Ok(subnets)
}

impl FromStr for Subnet {
    type Err = Error;

    fn from_str(text: &str) -> Result<Subnet, Error> {
        let bad = || Error::Config(format!("{text:?} is not a subnet like 10.88.0.0/16"));
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        if prefix > if address.is_ipv4() { 32 } else { 128 } {
            return Err(bad());
        }
        let address = match address {
            IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() & mask4(prefix)).into(),
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & mask6(prefix)).into(),
        };
        Ok(Subnet { address, prefix })
    }
}

impl TryFrom<String> for Subnet {
    type Error = Error;

    fn try_from(text: String) -> Result<Subnet, Error> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

fn mask4(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

fn mask6(prefix: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn subnets_are_read_and_brought_to_their_canonical_form() {
        for (text, canonical) in [
            ("10.88.0.0/16", "10.88.0.0/16"),
            ("10.88.3.4/16", "10.88.0.0/16"),
            ("fd00::5/64", "fd00::/64"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("10.1.2.3/32", "10.1.2.3/32"),
        ] {
            assert_eq!(text.parse::<Subnet>().unwrap().to_string(), canonical);
        }
        for text in ["", "10.88.0.0", "10.88.0.0/33", "fd00::/129", "10.88.0/16", "10.88.0.0/-1", "x/8"] {
            assert!(text.parse::<Subnet>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_smallest_subnets_have_no_room_for_pods() {
        for (text, pods) in [
            ("10.0.0.0/32", 0),
            ("10.0.0.0/31", 0),
            ("10.0.0.0/30", 1),
            ("10.0.0.0/24", 253),
            ("fd00::/64", (1 << 20) - 3),
        ] {
            assert_eq!(text.parse::<Subnet>().unwrap().pods(), pods, "{text}");
        }
    }

    proptest! {
        #[test]
        fn pods_get_addresses_of_their_subnet_and_never_the_gateways(net in any::<u32>(), prefix in 8u8..=30, number in any::<u32>()) {
            let subnet: Subnet = format!("{}/{prefix}", Ipv4Addr::from_bits(net)).parse().unwrap();
            let number = number % subnet.pods();
            let ip = subnet.pod(number);
            prop_assert!(subnet.contains(ip));
            prop_assert_ne!(ip, subnet.gateway());
            prop_assert_ne!(ip, subnet.address());
            prop_assert!(subnet.contains(subnet.pod(subnet.pods() - 1)));
        }
    }
}
