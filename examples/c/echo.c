/* An echo device (VSP) and its driver (VSC) in one process: the smallest whole use of the C interface.
 *
 *   cc -std=c11 echo.c $(pkg-config --cflags --libs kmcl) -pthread -o echo && ./echo */
#include <semaphore.h>
#include <stdio.h>

#include "kmcl.h"

#define PACKETS 1000u

static const GUID ECHO_TYPE = {0x6c8d9f5eu, 0x3a41, 0x4c0b, {0x9d, 0x0e, 0x2f, 0x1b, 0x7a, 0x60, 0x11, 0xec}};
static const GUID ECHO_INSTANCE = {1, 0, 0, {0}};

static KMCL_SERVER_INTERFACE_V1 Kmcl;

/* ---- The device: completes each packet with its own payload ------------------------------------ */

static EVT_VMB_CHANNEL_PROCESS_PACKET EchoProcessPacket;

static VOID EchoProcessPacket(VMBCHANNEL Channel, VMBPACKETCOMPLETION Packet, PVOID Buffer,
                              UINT32 BufferLength, UINT32 Flags)
{
    UNREFERENCED_PARAMETER(Channel);
    UNREFERENCED_PARAMETER(Flags);
    Kmcl.VmbChannelPacketComplete(Packet, Buffer, BufferLength);
}

static NTSTATUS EchoDeviceAdd(PDEVICE_OBJECT Device, VMBCHANNEL *Channel)
{
    NTSTATUS status = Kmcl.VmbChannelAllocate(Device, TRUE, Channel);
    if (!NT_SUCCESS(status)) {
        return status;
    }
    status = Kmcl.VmbServerChannelInitSetTargetInterfaceId(*Channel, ECHO_TYPE, ECHO_INSTANCE);
    if (NT_SUCCESS(status)) {
        status = Kmcl.VmbChannelInitSetProcessPacketCallbacks(*Channel, EchoProcessPacket, NULL);
    }
    if (NT_SUCCESS(status)) {
        status = Kmcl.VmbChannelEnable(*Channel);
    }
    if (!NT_SUCCESS(status)) {
        Kmcl.VmbChannelCleanup(*Channel);
        return status;
    }
    Kmcl.VmbChannelStart(*Channel);
    return status;
}

/* ---- The driver: sends, and counts the answers that are right ---------------------------------- */

typedef struct DRIVER {
    sem_t Done;
    UINT32 Answers;
    UINT32 Wrong;
} DRIVER;

static EVT_VMB_PACKET_COMPLETION_ROUTINE DriverCompleted;
static EVT_VMB_CHANNEL_POST_STARTED DriverPostStarted;

static VOID DriverCompleted(VMBPACKET Packet, NTSTATUS Status, PVOID Buffer, UINT32 BufferLength)
{
    DRIVER *driver = (DRIVER *)Kmcl.VmbChannelGetPointer(Kmcl.VmbPacketGetChannel(Packet));
    UINT64 sent = (UINT64)(ULONG_PTR)Kmcl.VmbPacketGetPointer(Packet);

    if (Status != STATUS_SUCCESS || BufferLength != sizeof sent || memcmp(Buffer, &sent, sizeof sent) != 0) {
        driver->Wrong++;
    }
    Kmcl.VmbPacketFree(Packet);
    if (++driver->Answers == PACKETS) {
        sem_post(&driver->Done);
    }
}

static VOID DriverPostStarted(VMBCHANNEL Channel)
{
    UINT64 number;

    for (number = 0; number < PACKETS; number++) {
        VMBPACKET packet = Kmcl.VmbPacketAllocate(Channel);
        if (packet == NULL) {
            return;
        }
        Kmcl.VmbPacketSetPointer(packet, (PVOID)(ULONG_PTR)number);
        Kmcl.VmbPacketSetCompletionRoutine(packet, DriverCompleted);
        if (!NT_SUCCESS(Kmcl.VmbPacketSend(packet, &number, sizeof number, NULL,
                                           VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION))) {
            Kmcl.VmbPacketFree(packet);
            return;
        }
    }
}

static NTSTATUS DriverStart(PDEVICE_OBJECT Device, DRIVER *Driver, VMBCHANNEL *Channel)
{
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS callbacks;
    NTSTATUS status = Kmcl.VmbChannelAllocate(Device, FALSE, Channel);
    if (!NT_SUCCESS(status)) {
        return status;
    }
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT(&callbacks);
    callbacks.EvtChannelPostStarted = DriverPostStarted;
    Kmcl.VmbChannelSetPointer(*Channel, Driver);
    status = Kmcl.VmbChannelInitSetStateChangeCallbacks(*Channel, &callbacks);
    if (NT_SUCCESS(status)) {
        status = Kmcl.VmbClientChannelInitSetTargetPnp(*Channel, &ECHO_TYPE, NULL, NULL);
    }
    if (NT_SUCCESS(status)) {
        status = Kmcl.VmbChannelEnable(*Channel);
    }
    if (!NT_SUCCESS(status)) {
        Kmcl.VmbChannelCleanup(*Channel);
    }
    return status;
}

/* ---- In place of Windows ----------------------------------------------------------------------- */

int main(void)
{
    KMCL_BUS bus;
    KMCL_WORKER host, guest;
    PDEVICE_OBJECT on_host, in_guest;
    VMBCHANNEL server, client;
    DRIVER driver = {.Answers = 0};

    if (!NT_SUCCESS(KmclQueryInterface(&KMCL_SERVER_INTERFACE_TYPE, sizeof Kmcl,
                                       KMCL_SERVER_INTERFACE_VERSION_V1, (PINTERFACE)(void *)&Kmcl)) ||
        !NT_SUCCESS(KmclLoopbackCreate(1u << 20, &bus)) ||
        !NT_SUCCESS(KmclWorkerCreate("host", &host)) ||
        !NT_SUCCESS(KmclWorkerCreate("guest", &guest)) ||
        !NT_SUCCESS(KmclDeviceCreate(bus, host, &on_host)) ||
        !NT_SUCCESS(KmclDeviceCreate(bus, guest, &in_guest)) || sem_init(&driver.Done, 0, 0) != 0 ||
        !NT_SUCCESS(EchoDeviceAdd(on_host, &server)) ||
        !NT_SUCCESS(DriverStart(in_guest, &driver, &client))) {
        fprintf(stderr, "cannot start\n");
        return 1;
    }
    while (sem_wait(&driver.Done) != 0) {
    }
    Kmcl.VmbChannelDisable(client);
    Kmcl.VmbChannelDisable(server);
    Kmcl.VmbChannelCleanup(client);
    Kmcl.VmbChannelCleanup(server);
    KmclDeviceDelete(in_guest);
    KmclDeviceDelete(on_host);
    KmclClose(guest);
    KmclClose(host);
    KmclClose(bus);
    Kmcl.InterfaceDereference(Kmcl.Context);
    printf("%u packets echoed, %u wrong\n", driver.Answers, driver.Wrong);
    return driver.Wrong == 0 ? 0 : 1;
}
