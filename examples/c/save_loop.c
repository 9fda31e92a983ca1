/* The documented save, as a driver's author writes it: a device that tells its driver things is paused with
 * telegrams in flight, saved in chunks into a file, and goes on as another channel that was restored from it.
 *
 *   cc -std=c11 save_loop.c $(pkg-config --cflags --libs kmcl) -pthread -o save_loop && ./save_loop */
#include <semaphore.h>
#include <stdio.h>

#include "kmcl.h"

#define TELEGRAMS 8u

static const GUID NEWS_TYPE = {0x2d1f0c55u, 0x8a0e, 0x4d7b, {0xb2, 0x64, 0x61, 0x39, 0x5e, 0x0f, 0x77, 0x01}};
static const GUID NEWS_INSTANCE = {1, 0, 0, {0}};

static KMCL_SERVER_INTERFACE_V1 Kmcl;

/* What the device knows of each telegram in flight. */
typedef struct TELEGRAM {
    UINT32 Number;
} TELEGRAM;

static TELEGRAM Telegrams[TELEGRAMS];
static UINT32 Acknowledged;
static sem_t AllAcknowledged, Received, ServerStarted;

static VOID TelegramDone(VMBPACKET Packet, NTSTATUS Status, PVOID Buffer, UINT32 BufferLength)
{
    TELEGRAM *telegram = (TELEGRAM *)Kmcl.VmbPacketGetPointer(Packet);

    if (Status == STATUS_SUCCESS && BufferLength == 8 && *(UCHAR *)Buffer == telegram->Number) {
        Acknowledged++;
    }
    Kmcl.VmbPacketFree(Packet);
    if (Acknowledged == TELEGRAMS) {
        sem_post(&AllAcknowledged);
    }
}

/* ---- What is kept with a packet in flight: asked for twice, first for the size ----------------- */

static NTSTATUS NewsSavePacket(VMBCHANNEL Channel, VMBPACKET Packet, PVOID SaveBuf, UINT32 SaveBufSize,
                               PUINT32 BytesNeeded)
{
    UNREFERENCED_PARAMETER(Channel);
    *BytesNeeded = sizeof(TELEGRAM);
    if (SaveBufSize < sizeof(TELEGRAM)) {
        return STATUS_BUFFER_TOO_SMALL;
    }
    RtlCopyMemory(SaveBuf, Kmcl.VmbPacketGetPointer(Packet), sizeof(TELEGRAM));
    return STATUS_SUCCESS;
}

static NTSTATUS NewsRestorePacket(VMBCHANNEL Channel, PVOID LibBuf, UINT32 LibBufSize, PVOID SaveBuf,
                                  UINT32 SaveBufSize)
{
    TELEGRAM saved;
    VMBPACKET packet;
    NTSTATUS status;

    if (SaveBufSize != sizeof saved) {
        return STATUS_INVALID_PARAMETER;
    }
    RtlCopyMemory(&saved, SaveBuf, sizeof saved);
    if (saved.Number >= TELEGRAMS) {
        return STATUS_INVALID_PARAMETER;
    }
    packet = Kmcl.VmbPacketAllocate(Channel);
    if (packet == NULL) {
        return STATUS_INSUFFICIENT_RESOURCES;
    }
    Telegrams[saved.Number] = saved;
    Kmcl.VmbPacketSetPointer(packet, &Telegrams[saved.Number]);
    Kmcl.VmbPacketSetCompletionRoutine(packet, TelegramDone);
    status = Kmcl.VmbPacketRestore(packet, LibBuf, LibBufSize);
    if (!NT_SUCCESS(status)) {
        Kmcl.VmbPacketFree(packet);
    }
    return status;
}

/* ---- The loop ---------------------------------------------------------------------------------- */

/* Each buffer goes into the file behind its length: a restore wants whole chunks. */
static NTSTATUS SaveChannel(VMBCHANNEL Channel, FILE *File)
{
    ULONG size = 64, filled, required;
    PVOID buffer = malloc(size), larger;
    NTSTATUS status = Kmcl.VmbChannelSaveBegin(Channel);

    if (!NT_SUCCESS(status)) {
        free(buffer);
        return status;
    }
    while (buffer != NULL) {
        status = Kmcl.VmbChannelSaveContinue(Channel, buffer, size, &filled, &required);
        if (filled != 0 && (fwrite(&filled, sizeof filled, 1, File) != 1 || fwrite(buffer, filled, 1, File) != 1)) {
            status = STATUS_UNSUCCESSFUL;
        }
        /* Both of these fail NT_SUCCESS, and neither is a failure. */
        if (status != STATUS_BUFFER_OVERFLOW && status != STATUS_BUFFER_TOO_SMALL) {
            break;
        }
        if (required > size) {
            larger = realloc(buffer, required);
            if (larger == NULL) {
                status = STATUS_INSUFFICIENT_RESOURCES;
                break;
            }
            buffer = larger;
            size = required;
        }
    }
    Kmcl.VmbChannelSaveEnd(Channel); /* in every case after a successful begin */
    free(buffer);
    return status;
}

static NTSTATUS RestoreChannel(VMBCHANNEL Channel, FILE *File)
{
    NTSTATUS status = STATUS_MORE_PROCESSING_REQUIRED;
    ULONG filled;

    while (status == STATUS_MORE_PROCESSING_REQUIRED && fread(&filled, sizeof filled, 1, File) == 1) {
        PVOID buffer = malloc(filled);
        if (buffer == NULL || fread(buffer, filled, 1, File) != 1) {
            status = STATUS_INVALID_PARAMETER;
        } else {
            status = Kmcl.VmbChannelRestoreFromBuffer(Channel, buffer, filled);
        }
        free(buffer);
    }
    return status;
}

/* ---- The rest of the device, and a driver that is slow to acknowledge -------------------------- */

static VOID NewsPostStarted(VMBCHANNEL Channel)
{
    UNREFERENCED_PARAMETER(Channel);
    sem_post(&ServerStarted);
}

static VMBCHANNEL NewsServer(PDEVICE_OBJECT Device)
{
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS callbacks;
    VMBCHANNEL channel;

    VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT(&callbacks);
    callbacks.EvtChannelPostStarted = NewsPostStarted;
    if (!NT_SUCCESS(Kmcl.VmbChannelAllocate(Device, TRUE, &channel)) ||
        !NT_SUCCESS(Kmcl.VmbServerChannelInitSetTargetInterfaceId(channel, NEWS_TYPE, NEWS_INSTANCE)) ||
        !NT_SUCCESS(Kmcl.VmbChannelInitSetMaximumPacketSize(channel, 64)) ||
        !NT_SUCCESS(Kmcl.VmbChannelInitSetStateChangeCallbacks(channel, &callbacks)) ||
        !NT_SUCCESS(Kmcl.VmbServerChannelInitSetSaveRestorePacketCallbacks(channel, NewsSavePacket,
                                                                            NewsRestorePacket)) ||
        !NT_SUCCESS(Kmcl.VmbChannelEnable(channel))) {
        fprintf(stderr, "cannot make a server\n");
        exit(1);
    }
    return channel;
}

static VMBPACKETCOMPLETION Kept[TELEGRAMS];
static UINT32 KeptCount;

static VOID ReaderProcessPacket(VMBCHANNEL Channel, VMBPACKETCOMPLETION Packet, PVOID Buffer,
                                UINT32 BufferLength, UINT32 Flags)
{
    UNREFERENCED_PARAMETER(Channel);
    UNREFERENCED_PARAMETER(Buffer);
    UNREFERENCED_PARAMETER(BufferLength);
    UNREFERENCED_PARAMETER(Flags);
    Kept[KeptCount++] = Packet;
    sem_post(&Received);
}

int main(void)
{
    FILE *file = tmpfile();
    KMCL_BUS bus;
    PDEVICE_OBJECT device;
    KMCL_WORKER host, guest;
    PDEVICE_OBJECT in_guest;
    VMBCHANNEL server, moved, client;
    UINT32 number;
    long bytes;

    if (file == NULL || sem_init(&AllAcknowledged, 0, 0) != 0 || sem_init(&Received, 0, 0) != 0 ||
        sem_init(&ServerStarted, 0, 0) != 0 ||
        !NT_SUCCESS(KmclQueryInterface(&KMCL_SERVER_INTERFACE_TYPE, sizeof Kmcl,
                                       KMCL_SERVER_INTERFACE_VERSION_V1, (PINTERFACE)(void *)&Kmcl)) ||
        !NT_SUCCESS(KmclLoopbackCreate(1u << 20, &bus)) || !NT_SUCCESS(KmclWorkerCreate("host", &host)) ||
        !NT_SUCCESS(KmclWorkerCreate("guest", &guest)) || !NT_SUCCESS(KmclDeviceCreate(bus, host, &device)) ||
        !NT_SUCCESS(KmclDeviceCreate(bus, guest, &in_guest)) ||
        !NT_SUCCESS(Kmcl.VmbChannelAllocate(in_guest, FALSE, &client)) ||
        !NT_SUCCESS(Kmcl.VmbClientChannelInitSetTargetPnp(client, &NEWS_TYPE, NULL, NULL)) ||
        !NT_SUCCESS(Kmcl.VmbChannelInitSetProcessPacketCallbacks(client, ReaderProcessPacket, NULL)) ||
        /* Room for an answer of this size is set aside before a packet is delivered. */
        !NT_SUCCESS(Kmcl.VmbChannelInitSetMaximumPacketSize(client, 64)) ||
        !NT_SUCCESS(Kmcl.VmbChannelEnable(client))) {
        fprintf(stderr, "cannot start\n");
        return 1;
    }
    server = NewsServer(device);
    Kmcl.VmbChannelStart(server);
    sem_wait(&ServerStarted);
    for (number = 0; number < TELEGRAMS; number++) {
        VMBPACKET packet = Kmcl.VmbPacketAllocate(server);
        UINT64 text = number;
        Telegrams[number].Number = number;
        Kmcl.VmbPacketSetPointer(packet, &Telegrams[number]);
        Kmcl.VmbPacketSetCompletionRoutine(packet, TelegramDone);
        if (!NT_SUCCESS(Kmcl.VmbPacketSend(packet, &text, sizeof text, NULL,
                                           VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION))) {
            return 1;
        }
        sem_wait(&Received);
    }

    Kmcl.VmbChannelPause(server);
    if (!NT_SUCCESS(SaveChannel(server, file))) {
        fprintf(stderr, "cannot save\n");
        return 1;
    }
    bytes = ftell(file);
    /* The guest stays where it is; here, in one process, the channel is told so. */
    if (!NT_SUCCESS(KmclChannelFreeze(server)) || !NT_SUCCESS(KmclChannelMoveAway(server))) {
        return 1;
    }
    Kmcl.VmbChannelCleanup(server);
    memset(Telegrams, 0, sizeof Telegrams);

    rewind(file);
    moved = NewsServer(device);
    if (!NT_SUCCESS(RestoreChannel(moved, file))) {
        fprintf(stderr, "cannot restore\n");
        return 1;
    }
    /* The driver acknowledges what it had received from the former channel. */
    for (number = 0; number < TELEGRAMS; number++) {
        UINT64 answer = number;
        Kmcl.VmbChannelPacketComplete(Kept[number], &answer, sizeof answer);
    }
    Kmcl.VmbChannelStart(moved);
    sem_wait(&AllAcknowledged);
    Kmcl.VmbChannelDisable(client);
    Kmcl.VmbChannelDisable(moved);
    Kmcl.VmbChannelCleanup(client);
    Kmcl.VmbChannelCleanup(moved);
    KmclDeviceDelete(device);
    KmclDeviceDelete(in_guest);
    KmclClose(host);
    KmclClose(guest);
    KmclClose(bus);
    fclose(file);
    printf("%u telegrams in flight, saved in %ld bytes, %u acknowledged after the restore\n", TELEGRAMS, bytes,
           Acknowledged);
    return 0;
}
