/* What Windows has no name for: buses, memory, threads, channels in an event loop of one's own, and this
 * library's extensions. Everything documented is in vmbuskernelmodeclientlibapi.h. */
#ifndef KMCL_H
#define KMCL_H

#include "vmbuskernelmodeclientlibapi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the library: major << 16 | minor << 8 | patch. */
#define KMCL_VERSION 0x000100u
UINT32 KmclVersion(void);

/* ---- The tables of functions ------------------------------------------------------------------- */

/* Takes the place of WdfFdoQueryForInterface: fills *Interface, whose size is Size, and takes one
 * reference. Type, size and version are those of KMCL_CLIENT_INTERFACE_V1 or KMCL_SERVER_INTERFACE_V1.
 *
 * STATUS_INVALID_PARAMETER_1 / _4: a null pointer. STATUS_NOT_SUPPORTED: an unknown type or version.
 * STATUS_INVALID_BUFFER_SIZE: another size. *Interface is written only on success. */
NTSTATUS KmclQueryInterface(_In_ LPCGUID InterfaceType, _In_ USHORT Size, _In_ USHORT Version,
                            _Out_ PINTERFACE Interface);

/* References that queries and InterfaceReference have taken and InterfaceDereference has not given back. */
UINT32 KmclInterfaceReferences(void);

/* ---- Buses, workers, devices ------------------------------------------------------------------- */

typedef struct KMCL_BUS_OPAQUE *KMCL_BUS;
typedef struct KMCL_WORKER_OPAQUE *KMCL_WORKER;

/* A bus whose two ends are in this process, with MemoryBytes of memory that both share, a multiple of 4096.
 * Every offer is seen by every client of the same bus. */
NTSTATUS KmclLoopbackCreate(_In_ UINT64 MemoryBytes, _Out_ KMCL_BUS *Bus);

/* A thread that drives the channels of the devices that name it: their callbacks run there. Name is shown by
 * the system, 15 bytes of it. */
NTSTATUS KmclWorkerCreate(_In_ const char *Name, _Out_ KMCL_WORKER *Worker);

/* Lets go of a bus, a worker, or a handle from VmbConvertVmbusHandleToKernelHandle. What devices and channels
 * still use lives as long as they do. */
VOID KmclClose(_In_ HANDLE Handle);
#define ZwClose(handle) KmclClose(handle)

/* What VmbChannelAllocate asks for: where a channel lives and who drives it. Bus may be NULL where every
 * channel is a server's and names its own (VmbServerChannelInitSetVmbusHandle). Worker may be NULL: the
 * channels are then driven by KmclChannelProcess, and by calls that block. */
NTSTATUS KmclDeviceCreate(_In_opt_ KMCL_BUS Bus, _In_opt_ KMCL_WORKER Worker, _Out_ PDEVICE_OBJECT *Device);
VOID KmclDeviceDelete(_In_ PDEVICE_OBJECT Device);

/* ---- A bus whose guest is another process ------------------------------------------------------ */

/* Serves one guest after another at a Unix socket, on which only this user may connect; a socket whose server
 * is gone is replaced. The worker drives it. STATUS_OBJECT_NAME_COLLISION: somebody serves there.
 * STATUS_INVALID_PARAMETER_1: not a path for a socket. */
NTSTATUS KmclUnixBusCreate(_In_ const char *SocketPath, _In_ KMCL_WORKER Worker, _Out_ KMCL_BUS *Bus);

/* A save: hold the bus, freeze its channels and wait for them, save; then either release the bus and thaw the
 * channels, or move away the channels and then the bus. None of it in callbacks.
 *
 * Hold: nothing is taken from the guest and nothing is given to it. Release: what was saved is void.
 * MoveAway: the guest, which is told nothing, goes on with whoever restores the state; the bus is over.
 * STATUS_INVALID_DEVICE_STATE where the bus is not in the state for it. */
NTSTATUS KmclUnixBusHold(_In_ KMCL_BUS Bus);
VOID KmclUnixBusRelease(_In_ KMCL_BUS Bus);
NTSTATUS KmclUnixBusMoveAway(_In_ KMCL_BUS Bus);

/* Writes the connection, the bus, up to 1 MiB of the driver's own, and each of the Count channels, all of them
 * frozen, to a file that is there as a whole or not at all. Any other status than STATUS_SUCCESS: nothing has
 * changed, and the bus is still held. */
NTSTATUS KmclUnixBusSave(_In_ KMCL_BUS Bus, _In_reads_(Count) const VMBCHANNEL *Channels, _In_ UINT32 Count,
                         _In_reads_bytes_(DeviceStateSize) const void *DeviceState,
                         _In_ UINT32 DeviceStateSize, _In_ const char *StatePath);

/* A restore: make the bus out of the file, make and enable the channels as they were, restore each of them, in
 * the order of the save, finish, and start them. The server that was saved must be gone.
 * STATUS_INVALID_PARAMETER_2: the file is damaged, or none. */
NTSTATUS KmclUnixBusRestore(_In_ const char *SocketPath, _In_ const char *StatePath, _In_ KMCL_WORKER Worker,
                            _Out_ KMCL_BUS *Bus);
/* The driver's own part of the state. STATUS_BUFFER_TOO_SMALL: *Needed says what it takes. */
NTSTATUS KmclUnixBusGetDeviceState(_In_ KMCL_BUS Bus, _Out_writes_bytes_(Size) PVOID Buffer, _In_ UINT32 Size,
                                   _Out_ PUINT32 Needed);
/* The statuses of VmbChannelRestoreFromBuffer; STATUS_ALREADY_COMMITTED: that one is restored. */
NTSTATUS KmclUnixBusRestoreChannel(_In_ KMCL_BUS Bus, _In_ UINT32 Index, _In_ VMBCHANNEL Channel);
/* Waits for the guest. STATUS_IO_TIMEOUT: it has not come back yet; STATUS_DEVICE_NOT_READY: not all channels
 * are restored. */
NTSTATUS KmclUnixBusFinishRestore(_In_ KMCL_BUS Bus, _In_ UINT32 Milliseconds);
/* From EvtVmbChannelOpened on: whether the channel was open before a restore, and its client knows of nothing
 * else. */
BOOLEAN KmclChannelIsResumed(_In_ VMBCHANNEL Channel);

/* ---- Memory ------------------------------------------------------------------------------------ */

/* Pages of a client's memory, which the server can reach: for external data and GPADLs. The channel must be
 * bound (from EvtVmbChannelOpened on is always right). They are given back by KmclChannelFreePages, or by
 * VmbChannelCleanup. STATUS_INVALID_DEVICE_STATE, STATUS_INSUFFICIENT_RESOURCES. */
NTSTATUS KmclChannelAllocatePages(_In_ VMBCHANNEL Channel, _In_ UINT32 Pages, _Out_ PVOID *Address);
VOID KmclChannelFreePages(_In_ VMBCHANNEL Channel, _In_ PVOID Address);

/* Copies between a buffer and the bytes of a chain of MDLs from Offset on, without mapping it. Returns the
 * bytes copied, fewer than Bytes at the end of the data. */
UINT32 KmclMdlRead(_In_ PMDL Mdl, _In_ UINT32 Offset, _Out_writes_bytes_(Bytes) PVOID Buffer,
                   _In_ UINT32 Bytes);
UINT32 KmclMdlWrite(_In_ PMDL Mdl, _In_ UINT32 Offset, _In_reads_bytes_(Bytes) const void *Buffer,
                    _In_ UINT32 Bytes);

/* ---- Channels in an event loop of one's own ---------------------------------------------------- */

typedef enum _KMCL_CHANNEL_STATE {
    KmclChannelDisabled = 0,
    KmclChannelEnabled = 1,
    KmclChannelConnecting = 2,
    KmclChannelOpening = 3,
    KmclChannelPaused = 4,
    KmclChannelActive = 5,
    KmclChannelPausing = 6,
    KmclChannelClosing = 7,
    KmclChannelClosed = 8,
    KmclChannelInvalid = 255 /* the handle names no channel */
} KMCL_CHANNEL_STATE;

KMCL_CHANNEL_STATE KmclChannelGetState(_In_ VMBCHANNEL Channel);

#define KMCL_PROGRESS_MORE 0x1u          /* the budget ended before the ring did: call again */
#define KMCL_PROGRESS_NEEDS_PASSIVE 0x2u /* what is next may sleep: call again at PASSIVE_LEVEL */

/* Does what is to be done for a channel without a worker: life-cycle steps with their callbacks, and up to
 * Budget packets. Irql says what this thread may do. Packets and Progress may be NULL. */
NTSTATUS KmclChannelProcess(_In_ VMBCHANNEL Channel, _In_ KIRQL Irql, _In_ UINT32 Budget,
                            _Out_opt_ PUINT32 Packets, _Out_opt_ PUINT32 Progress);

/* A descriptor that is readable when the peer has rung; -1 where there is none. It is the channel's: do not
 * close it. KmclChannelAcknowledge makes it quiet; call it before KmclChannelProcess. */
int KmclChannelDoorbell(_In_ VMBCHANNEL Channel);
VOID KmclChannelAcknowledge(_In_ VMBCHANNEL Channel);

/* Incoming packets that were delivered and not completed. */
UINT32 KmclChannelIncomingOutstanding(_In_ VMBCHANNEL Channel);

/* ---- Further setters, while the channel is Disabled -------------------------------------------- */

/* Bytes of the largest completion: room in the ring is reserved for it before a packet is delivered. */
NTSTATUS KmclChannelInitSetMaximumCompletionSize(_In_ VMBCHANNEL Channel, _In_ UINT32 Bytes);
/* The most incoming packets in flight, for which everything is reserved when the channel opens. */
NTSTATUS KmclChannelInitSetMaximumPacketCount(_In_ VMBCHANNEL Channel, _In_ UINT32 Packets);
/* Makes the channel the Index-th subchannel of its type and instance. */
NTSTATUS KmclChannelInitSetSubchannelIndex(_In_ VMBCHANNEL Channel, _In_ UINT16 Index);
/* The device-defined bytes of a server's offer, or of a client's open request. */
NTSTATUS KmclChannelInitSetUserData(
    _In_ VMBCHANNEL Channel,
    _In_reads_bytes_(VMBUS_SERVER_CHANNEL_INIT_MAXIMUM_OFFER_DATA) const void *UserData);

/* ---- Freezing: a save with packets in flight in both directions -------------------------------- */

/* What has become of the original I/O of a packet: none of it can happen any more. */
typedef enum _KMCL_FENCE {
    KmclFenceNeverStarted = 0, /* the device had not begun with it */
    KmclFenceCancelled = 1     /* it was cancelled, and that was confirmed */
} KMCL_FENCE;

/* The channel was frozen: begin no I/O; complete the packets you have, or hand them over, now or later. */
typedef VOID EVT_KMCL_CHANNEL_FREEZE(_In_ VMBCHANNEL Channel);
/* The channel goes on; packets that were handed over come next. */
typedef VOID EVT_KMCL_CHANNEL_THAW(_In_ VMBCHANNEL Channel);
/* A packet that was handed over comes again, after a thaw or a restore, with the state kept with it. */
typedef VOID EVT_KMCL_CHANNEL_RESUME_PACKET(_In_ VMBCHANNEL Channel, _In_ VMBPACKETCOMPLETION Packet,
                                            _In_reads_bytes_(BufferLength) PVOID Buffer,
                                            _In_ UINT32 BufferLength, _In_ UINT32 Flags,
                                            _In_ KMCL_FENCE Fence,
                                            _In_reads_bytes_(DeviceStateSize) PVOID DeviceState,
                                            _In_ UINT32 DeviceStateSize);

/* Set before VmbChannelInitSetProcessPacketCallbacks. Each may be NULL; without EvtResumePacket such a packet
 * comes through EvtVmbChannelProcessPacket. */
typedef struct _KMCL_FREEZE_CALLBACKS {
    UINT32 Size;
    EVT_KMCL_CHANNEL_FREEZE *EvtFreeze;
    EVT_KMCL_CHANNEL_THAW *EvtThaw;
    EVT_KMCL_CHANNEL_RESUME_PACKET *EvtResumePacket;
} KMCL_FREEZE_CALLBACKS;
NTSTATUS KmclChannelInitSetFreezeCallbacks(_In_ VMBCHANNEL Channel,
                                           _In_ const KMCL_FREEZE_CALLBACKS *Callbacks);

/* Freezes a server's channel: nothing is delivered, no completion leaves, life-cycle events wait. Then, when
 * KmclChannelRunning is 0, VmbChannelSaveBegin and its relatives save it with its packets in flight. */
NTSTATUS KmclChannelFreeze(_In_ VMBCHANNEL Channel);
/* Packets that the device has and has neither completed nor handed over. */
UINT32 KmclChannelRunning(_In_ VMBCHANNEL Channel);
/* Waits until that is 0; FALSE when Milliseconds are over before. */
BOOLEAN KmclChannelWaitSettled(_In_ VMBCHANNEL Channel, _In_ UINT32 Milliseconds);
/* Lets a frozen channel go on as if nothing had happened. */
VOID KmclChannelThaw(_In_ VMBCHANNEL Channel);
/* Ends a frozen channel here, because it goes on elsewhere: the peer learns nothing. Disabled then. */
NTSTATUS KmclChannelMoveAway(_In_ VMBCHANNEL Channel);
/* Hands a packet to its frozen channel, with what the device wants to know of it again, up to 1 MiB. The
 * handle is over on success. STATUS_INVALID_DEVICE_STATE: the channel is not frozen. */
NTSTATUS KmclPacketHandOver(_In_ VMBPACKETCOMPLETION Packet, _In_ KMCL_FENCE Fence,
                            _In_reads_bytes_(DeviceStateSize) const void *DeviceState,
                            _In_ UINT32 DeviceStateSize);

/* ---- The verifier ------------------------------------------------------------------------------ */

/* Whether a call that breaks a rule which no status reports, or that names a handle that is none, prints
 * function, argument and rule, and aborts. On in debug builds of the library, off in release builds, where
 * such a call does nothing, or returns the status of a bad argument. Returns what was set before. */
BOOLEAN KmclSetVerifier(_In_ BOOLEAN Enabled);

#ifdef __cplusplus
}
#endif
#endif /* KMCL_H */
