//! Socket connections: messages 21 and 23. A connection that is accepted becomes a channel, offered
//! with [`HvsockUserDefined`](crate::offer::HvsockUserDefined); only a refusal has a message.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::HEADER_SIZE;
use crate::guid::Guid;
use crate::status::NtStatus;

/// 21 TL_CONNECT_REQUEST, 40 bytes: the guest wants to connect to a service of the host.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct TlConnectRequest {
    /// At 8: the guest's end.
    pub endpoint_id: Guid,
    /// At 24: the host's service; for a vsock port see [`crate::hvsock`].
    pub service_id: Guid,
}

/// 21 TL_CONNECT_REQUEST, 56 bytes: from 5.2 on, where the guest sends that many.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct TlConnectRequestV2 {
    /// At 8: the shorter form.
    pub request: TlConnectRequest,
    /// At 40: the container that asks.
    pub silo_id: Guid,
}

/// 23 TL_CONNECT_RESULT, 44 bytes: the connection failed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct TlConnectResult {
    /// At 8: as in the request.
    pub endpoint_id: Guid,
    /// At 24: as in the request.
    pub service_id: Guid,
    /// At 40: an NTSTATUS, usually [`NtStatus::CONNECTION_REFUSED`].
    pub status: U32,
}

impl TlConnectResult {
    /// The answer to this request.
    #[must_use]
    pub fn new(request: &TlConnectRequest, status: NtStatus) -> Self {
        let TlConnectRequest { endpoint_id, service_id } = *request;
        Self { endpoint_id, service_id, status: status.0.into() }
    }

    /// Why it failed.
    #[must_use]
    pub const fn nt_status(&self) -> NtStatus {
        NtStatus(self.status.get())
    }
}

const _: () = {
    assert!(HEADER_SIZE + size_of::<TlConnectRequest>() == 40);
    assert!(HEADER_SIZE + size_of::<TlConnectRequestV2>() == 56);
    assert!(HEADER_SIZE + size_of::<TlConnectResult>() == 44);
};
