/* Incoming packets: section 6, quotas of section 14. */
#include "check.h"

static enum { ECHO, HOLD, DEFER, FAIL, EXTERNAL, CONTEXT, LATE } mode;
static VMBPACKETCOMPLETION held[8];
static int held_count;
static sem_t delivered;
static KIRQL irql_seen[4];
static int deliveries;
static UINT32 flags_seen;
static UINT32 batches, batch_packets;
static PMDL mdl_seen;
static NTSTATUS mdl_status, mdl_flags_status;
static int mdl_same, mdl_ok, mdl_read, mdl_written;
static PVOID context_seen;
static int context_zero;

static VOID process(VMBCHANNEL channel, VMBPACKETCOMPLETION packet, PVOID buffer, UINT32 length, UINT32 flags)
{
    KIRQL irql = KeGetCurrentIrql();
    PMDL again = NULL;
    UCHAR bytes[8];
    PUCHAR address;

    (void)channel;
    if (deliveries < 4) {
        irql_seen[deliveries] = irql;
    }
    deliveries++;
    flags_seen = flags;
    switch (mode) {
    case ECHO:
        k.VmbChannelPacketComplete(packet, buffer, length);
        break;
    case HOLD:
        held[held_count++] = packet;
        sem_post(&delivered);
        break;
    case DEFER:
        if (irql == DISPATCH_LEVEL) {
            k.VmbChannelPacketDeferToPassive(packet);
        } else {
            k.VmbChannelPacketComplete(packet, "deferred", 8);
        }
        break;
    case FAIL:
        k.VmbChannelPacketFail(packet);
        sem_post(&delivered);
        break;
    case EXTERNAL:
        mdl_flags_status = k.VmbChannelPacketGetExternalData(packet, 2, &mdl_seen);
        mdl_status = k.VmbChannelPacketGetExternalData(packet, 0, &mdl_seen);
        if (mdl_status == STATUS_SUCCESS) {
            mdl_same = k.VmbChannelPacketGetExternalData(packet, 0, &again) == STATUS_SUCCESS && again == mdl_seen;
            mdl_ok = MmGetMdlByteCount(mdl_seen) == 0x1010 && MmGetMdlByteOffset(mdl_seen) == 0xff0 && mdl_seen->Next == NULL;
            mdl_read = KmclMdlRead(mdl_seen, 0xc, bytes, 8) == 8 && memcmp(bytes, "external", 8) == 0;
            address = (PUCHAR)MmGetSystemAddressForMdlSafe(mdl_seen, NormalPagePriority);
            mdl_read = mdl_read && address != NULL && memcmp(address + 0xc, "external", 8) == 0;
            memcpy(address + 0xc, "answered", 8);
            mdl_written = KmclMdlWrite(mdl_seen, 0x100c, "tail and more", 13) == 4;
        }
        k.VmbChannelPacketComplete(packet, NULL, 0);
        break;
    case CONTEXT:
        context_seen = VmbChannelPacketGetClientContext(packet);
        if (context_seen != NULL) {
            static const UCHAR zero[16];
            context_zero = memcmp(context_seen, zero, sizeof zero) == 0;
            memset(context_seen, 0xaa, 16);
        }
        k.VmbChannelPacketComplete(packet, buffer, length);
        break;
    case LATE:
        held[held_count++] = packet;
        sem_post(&delivered);
        break;
    }
}

static VOID batch_end(VMBCHANNEL channel, UINT32 packets)
{
    (void)channel;
    batches++;
    batch_packets += packets;
}

static void send(SENT *sent, PVOID bytes, UINT32 length, PMDL mdl)
{
    VMBPACKET packet = noted_packet(client.channel, sent);
    NEED(k.VmbPacketSend(packet, bytes, length, mdl, WAIT) == STATUS_SUCCESS);
}

static void send_and_wait(SENT *sent, PVOID bytes, UINT32 length, PMDL mdl)
{
    send(sent, bytes, length, mdl);
    await(&sent->done);
}

int main(void)
{
    SENT sent[4];
    UCHAR message[8] = "message";
    PVOID pages;
    PMDL mdl, none = NULL;
    int i;

    begin();
    NEED(sem_init(&delivered, 0, 0) == 0);
    make_pair(process);
    NEED(k.VmbChannelInitSetProcessPacketCallbacks(server.channel, process, batch_end) == STATUS_SUCCESS);
    NEED(k.VmbChannelInitSetMaximumExternalData(server.channel, 8192, 2) == STATUS_SUCCESS);
    NEED(k.VmbChannelInitSetMaximumExternalData(client.channel, 65536, 4) == STATUS_SUCCESS);
    NEED(k.VmbChannelInitSetClientContextSize(server.channel, 16) == STATUS_SUCCESS);
    run_pair();

    mode = ECHO;
    send_and_wait(&sent[0], message, 8, NULL);
    ROW(EvtVmbChannelProcessPacket, "delivered", sent[0].status == STATUS_SUCCESS && sent[0].length == 8 && memcmp(sent[0].answer, message, 8) == 0);
    ROW(EvtVmbChannelProcessPacket, "dispatch-level", irql_seen[0] == DISPATCH_LEVEL);
    ROW(EvtVmbChannelProcessPacket, "D-46-no-external-data", flags_seen == 0);
    ROW(VmbChannelPacketComplete, "inline", sent[0].status == STATUS_SUCCESS);

    deliveries = 0;
    mode = DEFER;
    send_and_wait(&sent[0], message, 8, NULL);
    ROW(VmbChannelPacketDeferToPassive, "D-42", deliveries == 2 && irql_seen[0] == DISPATCH_LEVEL && irql_seen[1] == PASSIVE_LEVEL);
    ROW(VmbChannelPacketDeferToPassive, "completed", memcmp(sent[0].answer, "deferred", 8) == 0);

    deliveries = 0;
    mode = ECHO;
    k.VmbChannelSetIncomingProcessingAtPassive(server.channel, TRUE);
    send_and_wait(&sent[0], message, 8, NULL);
    ROW(VmbChannelSetIncomingProcessingAtPassive, "page", irql_seen[0] == PASSIVE_LEVEL);
    k.VmbChannelSetIncomingProcessingAtPassive(server.channel, FALSE);

    /* Held, and completed from another thread in another order. */
    mode = HOLD;
    for (i = 0; i < 3; i++) {
        message[0] = (UCHAR)i;
        send(&sent[i], message, 8, NULL);
        await(&delivered);
    }
    ROW(VmbChannelPacketGetExternalData, "D-43-late", k.VmbChannelPacketGetExternalData(held[0], 0, &mdl_seen) == STATUS_INVALID_PARAMETER_1);
    ROW(VmbChannelPacketGetExternalData, "null-output", k.VmbChannelPacketGetExternalData(held[0], 0, NULL) == STATUS_INVALID_PARAMETER_3);
    for (i = 2; i >= 0; i--) {
        message[0] = (UCHAR)(10 + i);
        k.VmbChannelPacketComplete(held[i], message, 8);
        await(&sent[i].done);
    }
    ROW(VmbChannelPacketComplete, "any-order-any-thread", sent[0].answer[0] == 10 && sent[1].answer[0] == 11 && sent[2].answer[0] == 12);
    /* Over: a second completion, and everything else, does nothing. */
    k.VmbChannelPacketComplete(held[0], message, 8);
    k.VmbChannelPacketFail(held[0]);
    k.VmbChannelPacketDeferToPassive(held[0]);
    ROW(VmbChannelPacketComplete, "twice", (await_outstanding(0), 1) && KmclChannelGetState(server.channel) == KmclChannelActive);
    ROW(VmbChannelPacketGetExternalData, "over", k.VmbChannelPacketGetExternalData(held[0], 0, &mdl_seen) == STATUS_INVALID_PARAMETER_1);
    ROW(VmbChannelPacketGetClientContext, "over", VmbChannelPacketGetClientContext(held[0]) == NULL);
    ROW(VmbChannelPacketComplete, "null-and-foreign", (k.VmbChannelPacketComplete(NULL, NULL, 0), k.VmbChannelPacketComplete((VMBPACKETCOMPLETION)(void *)server.channel, NULL, 0), 1));

    /* Pause waits for what was delivered. */
    held_count = 0;
    send(&sent[0], message, 8, NULL);
    await(&delivered);
    ROW(VmbChannelPacketDeferToPassive, "outside-callback", (k.VmbChannelPacketDeferToPassive(held[0]), await_outstanding(1), VmbChannelPacketGetClientContext(held[0]) != NULL));
    k.VmbChannelPacketComplete(held[0], NULL, 0);
    await(&sent[0].done);
    ROW(VmbChannelPacketComplete, "no-payload", sent[0].status == STATUS_SUCCESS && sent[0].length == 0);

    /* A quota of one: the second packet waits for the first one's completion. */
    held_count = 0;
    k.VmbChannelSetTransactionQuota(server.channel, 1);
    send(&sent[0], message, 8, NULL);
    send(&sent[1], message, 8, NULL);
    await(&delivered);
    ROW(VmbChannelSetTransactionQuota, "outstanding", (await_outstanding(1), held_count == 1));
    k.VmbChannelSetTransactionQuota(server.channel, 0);
    k.VmbChannelPacketComplete(held[0], NULL, 0);
    await(&delivered);
    ROW(VmbChannelSetTransactionQuota, "D-61-restart-by-completion", held_count == 2);
    k.VmbChannelPacketComplete(held[1], NULL, 0);
    await(&sent[0].done);
    await(&sent[1].done);
    k.VmbChannelSetTransactionQuota(server.channel, 0xffffffffu);

    mode = CONTEXT;
    send_and_wait(&sent[0], message, 8, NULL);
    send_and_wait(&sent[0], message, 8, NULL);
    ROW(VmbChannelPacketGetClientContext, "D-62", context_seen != NULL && context_zero);

    /* External data: two pages of the client, from an odd offset, in an order of their own. */
    NEED(KmclChannelAllocatePages(client.channel, 3, &pages) == STATUS_SUCCESS);
    memcpy((PUCHAR)pages + 0xffc, "external", 8);
    mdl = IoAllocateMdl((PUCHAR)pages + 0xff0, 0x1010, FALSE, FALSE, NULL);
    NEED(mdl != NULL);
    MmProbeAndLockPages(mdl, KernelMode, IoModifyAccess);
    ROW(MmProbeAndLockPages, "locked", (mdl->MdlFlags & MDL_PAGES_LOCKED) != 0);
    mode = EXTERNAL;
    send_and_wait(&sent[0], message, 8, mdl);
    ROW(EvtVmbChannelProcessPacket, "external-data-flag", flags_seen == VMBUS_CHANNEL_PROCESS_PACKET_FLAG_EXTERNAL_DATA);
    ROW(VmbChannelPacketGetExternalData, "undefined-flags", mdl_flags_status == STATUS_INVALID_PARAMETER_2);
    ROW(VmbChannelPacketGetExternalData, "mdl", mdl_status == STATUS_SUCCESS && mdl_ok);
    ROW(VmbChannelPacketGetExternalData, "D-43-same", mdl_same);
    ROW(MmGetSystemAddressForMdlSafe, "read", mdl_read);
    ROW(MmGetSystemAddressForMdlSafe, "write", memcmp((PUCHAR)pages + 0xffc, "answered", 8) == 0 && mdl_written);

    /* Pages in another order are mapped side by side. */
    {
        PFN_NUMBER swapped = MmGetMdlPfnArray(mdl)[0];
        MmGetMdlPfnArray(mdl)[0] = MmGetMdlPfnArray(mdl)[1];
        MmGetMdlPfnArray(mdl)[1] = swapped;
        memset(pages, 0, 3 * PAGE_SIZE);
        memcpy((PUCHAR)pages + PAGE_SIZE + 0xffc, "exte", 4);
        memcpy(pages, "rnal", 4);
        send_and_wait(&sent[0], message, 8, mdl);
        ROW(MmGetSystemAddressForMdlSafe, "scattered-read", mdl_read);
        ROW(MmGetSystemAddressForMdlSafe, "scattered-write", memcmp((PUCHAR)pages + PAGE_SIZE + 0xffc, "answ", 4) == 0 && memcmp(pages, "ered", 4) == 0);
        ROW(MmGetSystemAddressForMdlSafe, "over", MmGetSystemAddressForMdlSafe(mdl, NormalPagePriority) != NULL);
    }

    /* More than the server was set up for is the driver's to decide (D-40). */
    IoFreeMdl(mdl);
    mdl = IoAllocateMdl(pages, 3 * PAGE_SIZE, FALSE, FALSE, NULL);
    NEED(mdl != NULL);
    MmBuildMdlForNonPagedPool(mdl);
    send_and_wait(&sent[0], message, 8, mdl);
    ROW(VmbChannelPacketGetExternalData, "D-40", mdl_status == STATUS_INVALID_BUFFER_SIZE);
    send_and_wait(&sent[0], message, 8, NULL);
    ROW(VmbChannelPacketGetExternalData, "D-43-none", mdl_status == STATUS_INVALID_PARAMETER_1);
    IoFreeMdl(mdl);
    KmclChannelFreePages(client.channel, pages);
    none = IoAllocateMdl(message, 8, FALSE, FALSE, NULL);
    NEED(none != NULL);
    MmProbeAndLockPages(none, KernelMode, IoReadAccess);
    ROW(MmProbeAndLockPages, "foreign-memory", (none->MdlFlags & MDL_PAGES_LOCKED) == 0);
    IoFreeMdl(none);

    ROW(EvtVmbChannelProcessingComplete, "D-44", batches != 0 && batch_packets != 0);

    mode = FAIL;
    send(&sent[0], message, 8, NULL);
    await(&delivered);
    k.VmbChannelDisable(client.channel);
    await(&sent[0].done);
    ROW(VmbChannelPacketFail, "D-36-no-completion", sent[0].status == STATUS_CANCELLED);
    await(&server.closed);
    ROW(VmbChannelPacketFail, "D-36-closed", strstr(server.log, "UC") != NULL);
    NEED(k.VmbChannelEnable(client.channel) == STATUS_SUCCESS);
    await(&client.active);
    mode = ECHO;
    send_and_wait(&sent[0], message, 8, NULL);
    ROW(VmbChannelPacketFail, "D-36-again-after-reopening", sent[0].status == STATUS_SUCCESS);
    end_pair();
    return end();
}
