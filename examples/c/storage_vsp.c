/* A SCSI controller with one disk, an image file, for a guest in another process; and how it moves to another
 * process with requests in flight. Guests are vsc-storage and whatever else speaks VMBus at a Unix socket.
 *
 *   cc -std=c11 storage_vsp.c $(pkg-config --cflags --libs kmcl) -pthread -o storage_vsp
 *   ./storage_vsp SOCKET IMAGE            serves
 *   ./storage_vsp SOCKET IMAGE STATE      goes on where STATE was saved, as soon as the guest looks for it
 *
 * A line "save STATE" on standard input saves the server and moves it away; the end of input ends it. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* pread, pwrite */
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kmcl.h"

#define SECTOR_BYTES 512u
#define MAX_TRANSFER_BYTES 0x40000u
#define MAX_REQUESTS 1024u

/* ---- The storage protocol: what a packet carries, little-endian ------------------------------------ */

#define VSTOR_COMPLETE_IO 1u
#define VSTOR_EXECUTE_SRB 3u
#define VSTOR_RESET_LUN 4u
#define VSTOR_RESET_BUS 6u
#define VSTOR_BEGIN_INITIALIZATION 7u
#define VSTOR_END_INITIALIZATION 8u
#define VSTOR_QUERY_PROTOCOL_VERSION 9u
#define VSTOR_QUERY_PROPERTIES 10u

#define VSTOR_PACKET_BYTES 64u
#define VSTOR_COMPACT_BYTES 48u /* protocols before 5.1 */

typedef struct SRB {
    UINT16 Length;
    UINT8 SrbStatus;
    UINT8 ScsiStatus;
    UINT8 PortNumber;
    UINT8 PathId;
    UINT8 TargetId;
    UINT8 Lun;
    UINT8 CdbLength;
    UINT8 SenseInfoLength;
    UINT8 DataIn; /* 0: from the guest, 1: to it, 2: none */
    UINT8 Reserved;
    UINT32 DataTransferLength;
    UINT8 CdbOrSense[20];
    UINT8 Win8Extension[16];
} SRB;

typedef struct VSTOR_PACKET {
    UINT32 Operation;
    UINT32 Flags;
    UINT32 Status;
    union {
        SRB Srb;
        struct {
            UINT16 Version;
            UINT16 Revision;
        } Version;
        struct {
            UINT32 Reserved;
            UINT16 MaxSubChannelCount;
            UINT16 Reserved2;
            UINT32 Flags;
            UINT32 MaxTransferBytes;
            UINT32 Reserved3[2];
        } Properties;
        UINT8 Bytes[52];
    } Body;
} VSTOR_PACKET;

_Static_assert(offsetof(VSTOR_PACKET, Body) == 12, "the body follows the status");
_Static_assert(sizeof(SRB) == 52, "an SRB is all of the body");

#define SRB_STATUS_SUCCESS 0x01u
#define SRB_STATUS_ERROR 0x04u
#define SRB_STATUS_INVALID_REQUEST 0x06u
#define SRB_STATUS_INVALID_LUN 0x20u
#define SRB_STATUS_AUTOSENSE_VALID 0x80u
#define SCSI_GOOD 0x00u
#define SCSI_CHECK_CONDITION 0x02u

/* Sense key and additional sense code. */
#define SENSE_MEDIUM_ERROR 0x3u, 0x11u
#define SENSE_INVALID_OPCODE 0x5u, 0x20u
#define SENSE_LBA_OUT_OF_RANGE 0x5u, 0x21u
#define SENSE_INVALID_FIELD 0x5u, 0x24u
#define SENSE_NO_LUN 0x5u, 0x25u

static const GUID SCSI_TYPE = {0xba6163d9u, 0x04a1, 0x4d29, {0xb6, 0x05, 0x72, 0xe2, 0xff, 0xb1, 0xdc, 0x7f}};
static const GUID SCSI_INSTANCE = {0x6b6d636cu, 0x7363, 0x7369, {0x80, 0, 0, 0, 0, 0, 0, 0x0c}};

/* ---- The device ---------------------------------------------------------------------------------- */

typedef enum PHASE { PhaseClosed, PhaseBegun, PhaseAgreed, PhaseDescribed, PhaseReady } PHASE;

/* What of the device a guest relies on: saved beside the channel. */
typedef struct DEVICE_STATE {
    UINT32 Size;
    UINT32 Phase;
    UINT64 ImageBytes;
} DEVICE_STATE;

/* What is kept with a packet that has not come to its turn; the packet itself tells the rest. */
typedef struct REQUEST_STATE {
    UINT32 Size;
    UINT32 Moves; /* how often it was moved before */
} REQUEST_STATE;

typedef enum WORK { WorkRead, WorkWrite, WorkWriteThrough, WorkFlush } WORK;

/* In the packet's client context, from its callback to its completion. */
typedef struct REQUEST {
    LIST_ENTRY Entry;
    VMBPACKETCOMPLETION Packet;
    VSTOR_PACKET Answer;
    UINT32 AnswerLength;
    UINT32 Moves;
    WORK Work;
    PMDL Mdl;
    UINT64 Offset;
    UINT32 Bytes;
} REQUEST;

static KMCL_SERVER_INTERFACE_V1 Kmcl;
static int Image = -1;
static UINT64 ImageBytes;
static PHASE Phase; /* of packet and state-change callbacks, which do not overlap on a thread of their own */

static pthread_mutex_t Lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t Changed = PTHREAD_COND_INITIALIZER;
static LIST_ENTRY Queue;
static BOOLEAN IsFrozen, IsOver;
static UINT32 HandedOver, MovedBefore;

static UINT32 Big32(const UINT8 *bytes)
{
    return (UINT32)bytes[0] << 24 | (UINT32)bytes[1] << 16 | (UINT32)bytes[2] << 8 | bytes[3];
}

static UINT64 Big64(const UINT8 *bytes)
{
    return (UINT64)Big32(bytes) << 32 | Big32(bytes + 4);
}

static void PutBig32(UINT8 *bytes, UINT32 value)
{
    bytes[0] = (UINT8)(value >> 24);
    bytes[1] = (UINT8)(value >> 16);
    bytes[2] = (UINT8)(value >> 8);
    bytes[3] = (UINT8)value;
}

/* ---- Answers ------------------------------------------------------------------------------------- */

static void Complete(REQUEST *Request, NTSTATUS Status)
{
    VSTOR_PACKET answer = Request->Answer;

    answer.Operation = VSTOR_COMPLETE_IO;
    answer.Flags = 0;
    answer.Status = (UINT32)Status;
    /* The request is over with its packet: nothing of it is touched from here on. */
    Kmcl.VmbChannelPacketComplete(Request->Packet, &answer, Request->AnswerLength);
}

static void Good(REQUEST *Request, UINT32 Moved)
{
    SRB *srb = &Request->Answer.Body.Srb;

    srb->SrbStatus = SRB_STATUS_SUCCESS;
    srb->ScsiStatus = SCSI_GOOD;
    srb->SenseInfoLength = 0;
    srb->DataTransferLength = Moved;
    Complete(Request, STATUS_SUCCESS);
}

static void Refuse(REQUEST *Request, UINT8 SrbStatus, UINT8 Key, UINT8 Code)
{
    SRB *srb = &Request->Answer.Body.Srb;
    UINT8 sense[18] = {0x70, 0, Key, 0, 0, 0, 0, 10, 0, 0, 0, 0, Code};
    UINT8 room = srb->SenseInfoLength < sizeof sense ? srb->SenseInfoLength : (UINT8)sizeof sense;

    RtlZeroMemory(srb->CdbOrSense, sizeof srb->CdbOrSense);
    RtlCopyMemory(srb->CdbOrSense, sense, room);
    srb->SrbStatus = room != 0 ? (UINT8)(SrbStatus | SRB_STATUS_AUTOSENSE_VALID) : SrbStatus;
    srb->ScsiStatus = SCSI_CHECK_CONDITION;
    srb->SenseInfoLength = room;
    srb->DataTransferLength = 0;
    Complete(Request, STATUS_SUCCESS);
}

/* As much of an answer as the guest has asked for and has room for. */
static void Reply(REQUEST *Request, const void *Bytes, UINT32 Length, UINT32 Allocation)
{
    UINT32 room = Request->Answer.Body.Srb.DataTransferLength;

    Length = Length < Allocation ? Length : Allocation;
    Length = Length < room ? Length : room;
    if (Length != 0 && (Request->Mdl == NULL || KmclMdlWrite(Request->Mdl, 0, Bytes, Length) != Length)) {
        Refuse(Request, SRB_STATUS_INVALID_REQUEST, SENSE_INVALID_FIELD);
        return;
    }
    Good(Request, Length);
}

/* ---- I/O: on a thread of its own, one request after the other -------------------------------------- */

static BOOLEAN MoveBytes(const REQUEST *Request)
{
    UINT64 offset = Request->Offset;
    UINT32 left = Request->Bytes;
    PMDL mdl;

    for (mdl = Request->Mdl; mdl != NULL && left != 0; mdl = mdl->Next) {
        UINT32 bytes = MmGetMdlByteCount(mdl) < left ? MmGetMdlByteCount(mdl) : left;
        PUCHAR address = (PUCHAR)MmGetSystemAddressForMdlSafe(mdl, NormalPagePriority | MdlMappingNoExecute);
        if (address == NULL) {
            return FALSE;
        }
        left -= bytes;
        while (bytes != 0) {
            ssize_t done = Request->Work == WorkRead ? pread(Image, address, bytes, (off_t)offset)
                                                     : pwrite(Image, address, bytes, (off_t)offset);
            if (done <= 0) {
                if (done < 0 && errno == EINTR) {
                    continue;
                }
                return FALSE;
            }
            address += done;
            offset += (UINT64)done;
            bytes -= (UINT32)done;
        }
    }
    return left == 0;
}

static void Perform(REQUEST *Request)
{
    BOOLEAN done = Request->Work == WorkFlush || MoveBytes(Request);

    if (done && (Request->Work == WorkFlush || Request->Work == WorkWriteThrough)) {
        done = fdatasync(Image) == 0;
    }
    if (done) {
        Good(Request, Request->Bytes);
    } else {
        Refuse(Request, SRB_STATUS_ERROR, SENSE_MEDIUM_ERROR);
    }
}

static void *IoThread(void *Unused)
{
    UNREFERENCED_PARAMETER(Unused);
    (void)pthread_mutex_lock(&Lock);
    while (!IsOver) {
        if (IsFrozen || IsListEmpty(&Queue)) {
            (void)pthread_cond_wait(&Changed, &Lock);
            continue;
        }
        REQUEST *request = CONTAINING_RECORD(RemoveHeadList(&Queue), REQUEST, Entry);
        (void)pthread_mutex_unlock(&Lock);
        Perform(request);
        (void)pthread_mutex_lock(&Lock);
    }
    (void)pthread_mutex_unlock(&Lock);
    return NULL;
}

static void Enqueue(REQUEST *Request)
{
    (void)pthread_mutex_lock(&Lock);
    InsertTailList(&Queue, &Request->Entry);
    (void)pthread_cond_signal(&Changed);
    (void)pthread_mutex_unlock(&Lock);
}

/* ---- SCSI ------------------------------------------------------------------------------------------ */

static void ReadOrWrite(REQUEST *Request, UINT64 Lba, UINT32 Sectors, BOOLEAN IsWrite, BOOLEAN Through)
{
    UINT64 sectors = ImageBytes / SECTOR_BYTES;
    UINT64 bytes = (UINT64)Sectors * SECTOR_BYTES;

    if (Lba > sectors || Sectors > sectors - Lba) {
        Refuse(Request, SRB_STATUS_ERROR, SENSE_LBA_OUT_OF_RANGE);
    } else if (bytes > MAX_TRANSFER_BYTES || bytes > Request->Answer.Body.Srb.DataTransferLength ||
               (bytes != 0 && Request->Mdl == NULL) ||
               (bytes != 0 && Request->Answer.Body.Srb.DataIn != (IsWrite ? 0 : 1))) {
        Refuse(Request, SRB_STATUS_INVALID_REQUEST, SENSE_INVALID_FIELD);
    } else if (bytes == 0) {
        Good(Request, 0);
    } else {
        Request->Work = !IsWrite ? WorkRead : Through ? WorkWriteThrough : WorkWrite;
        Request->Offset = Lba * SECTOR_BYTES;
        Request->Bytes = (UINT32)bytes;
        Enqueue(Request);
    }
}

static void ExecuteCommand(REQUEST *Request)
{
    UINT8 cdb[16];
    UINT8 reply[36];
    UINT64 last = ImageBytes / SECTOR_BYTES - 1;
    const SRB *srb = &Request->Answer.Body.Srb;

    RtlCopyMemory(cdb, srb->CdbOrSense, sizeof cdb);
    if (srb->CdbLength == 0 || srb->CdbLength > sizeof cdb) {
        Refuse(Request, SRB_STATUS_INVALID_REQUEST, SENSE_INVALID_FIELD);
        return;
    }
    if (srb->PathId != 0 || srb->TargetId != 0 || srb->Lun != 0) {
        Refuse(Request, SRB_STATUS_INVALID_LUN, SENSE_NO_LUN);
        return;
    }
    RtlZeroMemory(cdb + srb->CdbLength, sizeof cdb - srb->CdbLength);
    RtlZeroMemory(reply, sizeof reply);
    switch (cdb[0]) {
    case 0x00: /* TEST UNIT READY */
        Good(Request, 0);
        break;
    case 0x12: /* INQUIRY, without pages */
        if ((cdb[1] & 1) != 0) {
            Refuse(Request, SRB_STATUS_ERROR, SENSE_INVALID_FIELD);
            break;
        }
        RtlCopyMemory(reply, "\0\0\6\2\37\0\0\2Msft    Virtual Disk    C1.0", 36);
        Reply(Request, reply, 36, (UINT32)cdb[3] << 8 | cdb[4]);
        break;
    case 0x25: /* READ CAPACITY(10) */
        PutBig32(reply, last > 0xffffffffu ? 0xffffffffu : (UINT32)last);
        PutBig32(reply + 4, SECTOR_BYTES);
        Reply(Request, reply, 8, 8);
        break;
    case 0x9e: /* SERVICE ACTION IN(16): READ CAPACITY(16) */
        if ((cdb[1] & 0x1f) != 0x10) {
            Refuse(Request, SRB_STATUS_ERROR, SENSE_INVALID_FIELD);
            break;
        }
        PutBig32(reply, (UINT32)(last >> 32));
        PutBig32(reply + 4, (UINT32)last);
        PutBig32(reply + 8, SECTOR_BYTES);
        Reply(Request, reply, 32, Big32(cdb + 10));
        break;
    case 0xa0: /* REPORT LUNS: 0 is all there is */
        PutBig32(reply, 8);
        Reply(Request, reply, 16, Big32(cdb + 6));
        break;
    case 0x28: /* READ(10) */
    case 0x2a: /* WRITE(10) */
        ReadOrWrite(Request, Big32(cdb + 2), (UINT32)cdb[7] << 8 | cdb[8], cdb[0] == 0x2a, (cdb[1] & 8) != 0);
        break;
    case 0x88: /* READ(16) */
    case 0x8a: /* WRITE(16) */
        ReadOrWrite(Request, Big64(cdb + 2), Big32(cdb + 10), cdb[0] == 0x8a, (cdb[1] & 8) != 0);
        break;
    case 0x35: /* SYNCHRONIZE CACHE(10), (16): all of it */
    case 0x91:
        Request->Work = WorkFlush;
        Request->Bytes = 0;
        Enqueue(Request);
        break;
    default:
        Refuse(Request, SRB_STATUS_ERROR, SENSE_INVALID_OPCODE);
        break;
    }
}

/* ---- Packets --------------------------------------------------------------------------------------- */

/* The guest's own idea of the protocol is not trusted: everything out of order is refused. */
static NTSTATUS Initialize(VSTOR_PACKET *Packet)
{
    UINT16 version = Packet->Body.Version.Version;
    UINT32 operation = Packet->Operation;

    RtlZeroMemory(&Packet->Body, sizeof Packet->Body);
    if (operation == VSTOR_BEGIN_INITIALIZATION && (Phase == PhaseClosed || Phase == PhaseReady)) {
        Phase = PhaseBegun;
    } else if (operation == VSTOR_QUERY_PROTOCOL_VERSION && Phase == PhaseBegun) {
        if (version != 0x0200 && version != 0x0402 && version != 0x0501 && version != 0x0600 && version != 0x0602) {
            return STATUS_REVISION_MISMATCH; /* the guest goes on with an older one */
        }
        Phase = PhaseAgreed;
    } else if (operation == VSTOR_QUERY_PROPERTIES && Phase == PhaseAgreed) {
        Packet->Body.Properties.MaxTransferBytes = MAX_TRANSFER_BYTES;
        Phase = PhaseDescribed;
    } else if (operation == VSTOR_END_INITIALIZATION && Phase == PhaseDescribed) {
        Phase = PhaseReady;
    } else {
        return STATUS_INVALID_DEVICE_STATE;
    }
    return STATUS_SUCCESS;
}

static void TakePacket(VMBPACKETCOMPLETION Packet, const void *Buffer, UINT32 BufferLength, UINT32 Flags,
                       UINT32 Moves)
{
    REQUEST *request = (REQUEST *)VmbChannelPacketGetClientContext(Packet);
    NTSTATUS status;

    if (request == NULL || (BufferLength != VSTOR_PACKET_BYTES && BufferLength != VSTOR_COMPACT_BYTES)) {
        Kmcl.VmbChannelPacketFail(Packet);
        return;
    }
    RtlZeroMemory(request, sizeof *request);
    RtlCopyMemory(&request->Answer, Buffer, BufferLength);
    request->Packet = Packet;
    request->AnswerLength = BufferLength;
    request->Moves = Moves;
    switch (request->Answer.Operation) {
    case VSTOR_EXECUTE_SRB:
        if (Phase != PhaseReady) {
            Complete(request, STATUS_INVALID_DEVICE_STATE);
            return;
        }
        if ((Flags & VMBUS_CHANNEL_PROCESS_PACKET_FLAG_EXTERNAL_DATA) != 0) {
            UINT32 access =
                request->Answer.Body.Srb.DataIn == 1 ? 0 : VMBUS_CHANNEL_PACKET_EXTERNAL_DATA_FLAG_READ_ONLY;
            status = Kmcl.VmbChannelPacketGetExternalData(Packet, access, &request->Mdl);
            if (status == STATUS_PENDING) {
                return; /* it comes again when its memory is there */
            }
            if (!NT_SUCCESS(status)) {
                Refuse(request, SRB_STATUS_INVALID_REQUEST, SENSE_INVALID_FIELD);
                return;
            }
        }
        ExecuteCommand(request);
        break;
    case VSTOR_RESET_LUN:
    case VSTOR_RESET_LUN + 1:
    case VSTOR_RESET_BUS:
        Complete(request, STATUS_SUCCESS); /* what is queued is soon done */
        break;
    case VSTOR_BEGIN_INITIALIZATION:
    case VSTOR_END_INITIALIZATION:
    case VSTOR_QUERY_PROTOCOL_VERSION:
    case VSTOR_QUERY_PROPERTIES:
        status = Initialize(&request->Answer);
        Complete(request, status);
        break;
    default:
        Complete(request, STATUS_INVALID_DEVICE_REQUEST);
        break;
    }
}

static VOID DiskProcessPacket(VMBCHANNEL Channel, VMBPACKETCOMPLETION Packet, PVOID Buffer, UINT32 BufferLength,
                              UINT32 Flags)
{
    UNREFERENCED_PARAMETER(Channel);
    TakePacket(Packet, Buffer, BufferLength, Flags, 0);
}

static VOID DiskOpenedOrClosed(VMBCHANNEL Channel)
{
    if (!KmclChannelIsResumed(Channel)) {
        Phase = PhaseClosed; /* a new guest, or none; one that is resumed goes on where it was */
    }
}

static NTSTATUS DiskOpened(VMBCHANNEL Channel)
{
    DiskOpenedOrClosed(Channel);
    return STATUS_SUCCESS;
}

/* ---- Freezing -------------------------------------------------------------------------------------- */

/* What has not come to its turn is handed over; what runs is completed, and the completion kept. */
static VOID DiskFreeze(VMBCHANNEL Channel)
{
    UNREFERENCED_PARAMETER(Channel);
    (void)pthread_mutex_lock(&Lock);
    IsFrozen = TRUE;
    HandedOver = 0;
    MovedBefore = 0;
    while (!IsListEmpty(&Queue)) {
        REQUEST *request = CONTAINING_RECORD(RemoveHeadList(&Queue), REQUEST, Entry);
        REQUEST_STATE state = {sizeof state, request->Moves + 1};
        if (NT_SUCCESS(KmclPacketHandOver(request->Packet, KmclFenceNeverStarted, &state, sizeof state))) {
            HandedOver++;
            MovedBefore += state.Moves > 1;
        } else {
            Refuse(request, SRB_STATUS_ERROR, SENSE_MEDIUM_ERROR);
        }
    }
    (void)pthread_mutex_unlock(&Lock);
}

static VOID DiskThaw(VMBCHANNEL Channel)
{
    UNREFERENCED_PARAMETER(Channel);
    (void)pthread_mutex_lock(&Lock);
    IsFrozen = FALSE;
    (void)pthread_cond_signal(&Changed);
    (void)pthread_mutex_unlock(&Lock);
}

/* A packet that was handed over, here or in another process: what it asks for is looked at anew. */
static VOID DiskResumePacket(VMBCHANNEL Channel, VMBPACKETCOMPLETION Packet, PVOID Buffer, UINT32 BufferLength,
                             UINT32 Flags, KMCL_FENCE Fence, PVOID DeviceState, UINT32 DeviceStateSize)
{
    REQUEST_STATE state;

    UNREFERENCED_PARAMETER(Channel);
    UNREFERENCED_PARAMETER(Fence); /* reads and writes can be done again in any case */
    if (DeviceStateSize != sizeof state) {
        Kmcl.VmbChannelPacketFail(Packet);
        return;
    }
    RtlCopyMemory(&state, DeviceState, sizeof state);
    TakePacket(Packet, Buffer, BufferLength, Flags, state.Moves);
}

/* ---- The server ------------------------------------------------------------------------------------ */

static KMCL_BUS Bus;
static VMBCHANNEL Disk;

static BOOLEAN MakeDisk(PDEVICE_OBJECT Device)
{
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS changes;
    KMCL_FREEZE_CALLBACKS freezing = {sizeof freezing, DiskFreeze, DiskThaw, DiskResumePacket};

    VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT(&changes);
    changes.EvtChannelOpened = DiskOpened;
    changes.EvtChannelClosed = DiskOpenedOrClosed;
    return NT_SUCCESS(Kmcl.VmbChannelAllocate(Device, TRUE, &Disk)) &&
           NT_SUCCESS(Kmcl.VmbServerChannelInitSetTargetInterfaceId(Disk, SCSI_TYPE, SCSI_INSTANCE)) &&
           NT_SUCCESS(Kmcl.VmbChannelInitSetMaximumPacketSize(Disk, VSTOR_PACKET_BYTES)) &&
           NT_SUCCESS(Kmcl.VmbChannelInitSetMaximumExternalData(Disk, MAX_TRANSFER_BYTES, 16)) &&
           NT_SUCCESS(Kmcl.VmbChannelInitSetClientContextSize(Disk, sizeof(REQUEST))) &&
           NT_SUCCESS(KmclChannelInitSetMaximumPacketCount(Disk, MAX_REQUESTS)) &&
           NT_SUCCESS(Kmcl.VmbChannelInitSetStateChangeCallbacks(Disk, &changes)) &&
           NT_SUCCESS(KmclChannelInitSetFreezeCallbacks(Disk, &freezing)) &&
           NT_SUCCESS(Kmcl.VmbChannelInitSetProcessPacketCallbacks(Disk, DiskProcessPacket, NULL)) &&
           NT_SUCCESS(Kmcl.VmbChannelEnable(Disk));
}

static BOOLEAN RestoreDisk(void)
{
    DEVICE_STATE state;
    UINT32 needed;

    /* A saved state is no more trusted than a guest. */
    if (!NT_SUCCESS(KmclUnixBusGetDeviceState(Bus, &state, sizeof state, &needed)) || needed != sizeof state ||
        state.Size != sizeof state || state.Phase > PhaseReady || state.ImageBytes != ImageBytes) {
        return FALSE;
    }
    Phase = (PHASE)state.Phase;
    return NT_SUCCESS(KmclUnixBusRestoreChannel(Bus, 0, Disk)) && NT_SUCCESS(KmclUnixBusFinishRestore(Bus, 20000));
}

/* TRUE: the disk goes on elsewhere. Otherwise it goes on here. */
static BOOLEAN SaveDisk(const char *StatePath)
{
    DEVICE_STATE state;
    NTSTATUS status = KmclUnixBusHold(Bus);

    if (!NT_SUCCESS(status)) {
        return FALSE;
    }
    status = KmclChannelFreeze(Disk);
    if (!NT_SUCCESS(status)) {
        KmclUnixBusRelease(Bus);
        return FALSE;
    }
    if (KmclChannelWaitSettled(Disk, 10000)) {
        RtlZeroMemory(&state, sizeof state);
        state.Size = sizeof state;
        state.Phase = (UINT32)Phase;
        state.ImageBytes = ImageBytes;
        status = KmclUnixBusSave(Bus, &Disk, 1, &state, sizeof state, StatePath);
    } else {
        status = STATUS_DEVICE_BUSY;
    }
    if (status != STATUS_SUCCESS) {
        KmclUnixBusRelease(Bus); /* first: what was saved is void before the channel goes on */
        KmclChannelThaw(Disk);
        return FALSE;
    }
    return NT_SUCCESS(KmclChannelMoveAway(Disk)) && NT_SUCCESS(KmclUnixBusMoveAway(Bus));
}

int main(int argc, char **argv)
{
    KMCL_WORKER worker;
    PDEVICE_OBJECT device;
    pthread_t io;
    struct stat image;
    char line[4096];
    BOOLEAN moved = FALSE;
    BOOLEAN restoring = argc == 4;
    NTSTATUS status;

    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: %s SOCKET IMAGE [STATE]\n", argv[0]);
        return 2;
    }
    Image = open(argv[2], O_RDWR | O_CLOEXEC);
    if (Image < 0 || fstat(Image, &image) != 0 || image.st_size < (off_t)SECTOR_BYTES) {
        fprintf(stderr, "%s is no image\n", argv[2]);
        return 1;
    }
    ImageBytes = (UINT64)image.st_size;
    InitializeListHead(&Queue);
    if (!NT_SUCCESS(KmclQueryInterface(&KMCL_SERVER_INTERFACE_TYPE, sizeof Kmcl, KMCL_SERVER_INTERFACE_VERSION_V1,
                                       (PINTERFACE)(void *)&Kmcl)) ||
        !NT_SUCCESS(KmclWorkerCreate("storage", &worker))) {
        return 1;
    }
    status = restoring ? KmclUnixBusRestore(argv[1], argv[3], worker, &Bus)
                       : KmclUnixBusCreate(argv[1], worker, &Bus);
    if (!NT_SUCCESS(status) || !NT_SUCCESS(KmclDeviceCreate(Bus, worker, &device)) || !MakeDisk(device) ||
        (restoring && !RestoreDisk()) || pthread_create(&io, NULL, IoThread, NULL) != 0) {
        fprintf(stderr, "cannot %s at %s: 0x%08x\n", restoring ? "go on" : "serve", argv[1], (unsigned)status);
        return 1;
    }
    Kmcl.VmbChannelStart(Disk);
    printf("%s %s\n", restoring ? "goes on at" : "serves at", argv[1]);
    (void)fflush(stdout);

    while (!moved && fgets(line, sizeof line, stdin) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        if (strncmp(line, "save ", 5) == 0) {
            moved = SaveDisk(line + 5);
            printf(moved ? "saved: %u requests handed over, %u of them moved before\n" : "not saved\n", HandedOver,
                   MovedBefore);
            (void)fflush(stdout);
        }
    }
    if (moved) {
        (void)fgets(line, sizeof line, stdin); /* until whoever has asked has seen it */
    } else {
        Kmcl.VmbChannelDisable(Disk); /* waits for what is in flight */
    }
    (void)pthread_mutex_lock(&Lock);
    IsOver = TRUE;
    (void)pthread_cond_signal(&Changed);
    (void)pthread_mutex_unlock(&Lock);
    (void)pthread_join(io, NULL);
    Kmcl.VmbChannelCleanup(Disk);
    KmclDeviceDelete(device);
    KmclClose(Bus);
    KmclClose(worker);
    (void)close(Image);
    return 0;
}
