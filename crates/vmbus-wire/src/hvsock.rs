//! Sockets over VMBus (hvsock): how a vsock port and a service GUID name the same thing.
//!
//! Source: devices section 4.

use crate::guid::Guid;

/// The service GUID of vsock port 0. The first field of the others is their port.
pub const VSOCK_TEMPLATE: Guid = Guid::from_u128(0x0000_0000_facb_11e6_bd58_6400_6a79_86d3);

/// The service GUID of a vsock port.
#[must_use]
pub const fn service_of_port(port: u32) -> Guid {
    Guid::from_u128(VSOCK_TEMPLATE.to_u128() | (port as u128) << 96)
}

/// The vsock port that a service GUID stands for, or `None` where it is not of that form.
#[must_use]
pub const fn port_of_service(service: Guid) -> Option<u32> {
    const BELOW_PORT: u128 = u128::MAX >> 32;
    if service.to_u128() & BELOW_PORT == VSOCK_TEMPLATE.to_u128() {
        Some(service.data1())
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_services_stand_for_each_other() {
        for (port, service) in [
            (0, "00000000-facb-11e6-bd58-64006a7986d3"),
            (22, "00000016-facb-11e6-bd58-64006a7986d3"),
            (0x1234_abcd, "1234abcd-facb-11e6-bd58-64006a7986d3"),
            (u32::MAX, "ffffffff-facb-11e6-bd58-64006a7986d3"),
        ] {
            let service = Guid::parse(service).unwrap();
            assert_eq!(service_of_port(port), service, "port {port}");
            assert_eq!(port_of_service(service), Some(port), "port {port}");
        }
    }

    #[test]
    fn other_services_have_no_port() {
        for service in [
            "00000016-facb-11e6-bd58-64006a7986d4",
            "00000016-facb-11e7-bd58-64006a7986d3",
            "00000016-0000-0000-0000-000000000000",
        ] {
            assert_eq!(port_of_service(Guid::parse(service).unwrap()), None, "{service}");
        }
    }
}
