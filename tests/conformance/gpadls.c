/* GPADLs: section 11. */
#include <pthread.h>

#include "check.h"

static void *delete_gpadl(void *gpadl)
{
    k.VmbChannelDeleteGpadl(client.channel, *(UINT32 *)gpadl);
    return NULL;
}

int main(void)
{
    PVOID pages = NULL;
    UCHAR stack[64];
    UINT32 gpadl = 0, second = 0, read_only = 0;
    PMDL mdl = NULL, own;
    PUCHAR address;
    pthread_t thread;

    begin();
    make_pair(NULL);
    ROW(KmclChannelAllocatePages, "not-bound", KmclChannelAllocatePages(client.channel, 1, &pages) == STATUS_INVALID_DEVICE_STATE);
    ROW(VmbChannelMapGpadl, "D-57-not-open", k.VmbChannelMapGpadl(server.channel, 0, 1, &mdl) == STATUS_INVALID_DEVICE_STATE);
    run_pair();
    NEED(KmclChannelAllocatePages(client.channel, 3, &pages) == STATUS_SUCCESS);
    ROW(VmbChannelCreateGpadlFromBuffer, "foreign-memory", k.VmbChannelCreateGpadlFromBuffer(client.channel, 0, stack, 64, &gpadl) == STATUS_INVALID_PARAMETER_3 && gpadl == 0);
    ROW(VmbChannelCreateGpadlFromBuffer, "beyond-the-pages", k.VmbChannelCreateGpadlFromBuffer(client.channel, 0, pages, 3 * PAGE_SIZE + 1, &gpadl) == STATUS_INVALID_PARAMETER_3);
    ROW(VmbChannelCreateGpadlFromBuffer, "4GiB-1", k.VmbChannelCreateGpadlFromBuffer(client.channel, 0, pages, 0xffffffffu, &gpadl) == STATUS_INVALID_PARAMETER_3);
    ROW(VmbChannelCreateGpadlFromBuffer, "0-bytes", k.VmbChannelCreateGpadlFromBuffer(client.channel, 0, pages, 0, &gpadl) == STATUS_INVALID_PARAMETER_4);
    ROW(VmbChannelCreateGpadlFromBuffer, "undefined-flags", k.VmbChannelCreateGpadlFromBuffer(client.channel, 2, pages, 64, &gpadl) == STATUS_INVALID_PARAMETER_2);
    ROW(VmbChannelCreateGpadlFromBuffer, "null-output", k.VmbChannelCreateGpadlFromBuffer(client.channel, 0, pages, 64, NULL) == STATUS_INVALID_PARAMETER_5);
    ROW(VmbChannelCreateGpadlFromBuffer, "server", k.VmbChannelCreateGpadlFromBuffer(server.channel, 0, pages, 64, &gpadl) == STATUS_INVALID_DEVICE_STATE);
    ROW(VmbChannelCreateGpadlFromBuffer, "created", k.VmbChannelCreateGpadlFromBuffer(client.channel, 0, pages, 2 * PAGE_SIZE, &gpadl) == STATUS_SUCCESS && gpadl != 0);

    memcpy((PUCHAR)pages + 4090, "across pages", 12);
    ROW(VmbChannelMapGpadl, "undefined-flags", k.VmbChannelMapGpadl(server.channel, 2, gpadl, &mdl) == STATUS_INVALID_PARAMETER_2);
    ROW(VmbChannelMapGpadl, "null-output", k.VmbChannelMapGpadl(server.channel, 0, gpadl, NULL) == STATUS_INVALID_PARAMETER_4);
    ROW(VmbChannelMapGpadl, "D-57-unknown", k.VmbChannelMapGpadl(server.channel, 0, gpadl + 1000, &mdl) == STATUS_INVALID_PARAMETER_3);
    ROW(VmbChannelMapGpadl, "mapped", k.VmbChannelMapGpadl(server.channel, 0, gpadl, &mdl) == STATUS_SUCCESS && MmGetMdlByteCount(mdl) == 2 * PAGE_SIZE);
    ROW(VmbChannelMapGpadl, "D-57-twice", k.VmbChannelMapGpadl(server.channel, 0, gpadl, &own) == STATUS_ALREADY_COMMITTED);
    address = (PUCHAR)MmGetSystemAddressForMdlSafe(mdl, NormalPagePriority);
    ROW(VmbChannelMapGpadl, "same-bytes", address != NULL && memcmp(address + 4090, "across pages", 12) == 0);
    memcpy(address, "written", 8);
    ROW(VmbChannelMapGpadl, "writable", memcmp(pages, "written", 8) == 0);
    ROW(VmbChannelMapGpadl, "copies", KmclMdlRead(mdl, 4090, stack, 12) == 12 && memcmp(stack, "across pages", 12) == 0);

    /* Delete waits for the unmap. */
    NEED(pthread_create(&thread, NULL, delete_gpadl, &gpadl) == 0);
    k.VmbChannelUnmapGpadl(server.channel, gpadl);
    NEED(pthread_join(thread, NULL) == 0);
    ROW(VmbChannelDeleteGpadl, "after-unmap", k.VmbChannelMapGpadl(server.channel, 0, gpadl, &mdl) == STATUS_INVALID_PARAMETER_3);
    k.VmbChannelUnmapGpadl(server.channel, gpadl); /* not mapped: ignored */
    k.VmbChannelDeleteGpadl(client.channel, gpadl); /* deleted: ignored */
    k.VmbChannelDeleteGpadl(client.channel, 0xffffffffu);

    own = IoAllocateMdl((PUCHAR)pages + 100, 5000, FALSE, FALSE, NULL);
    NEED(own != NULL);
    ROW(VmbChannelCreateGpadlFromMdl, "not-locked", k.VmbChannelCreateGpadlFromMdl(client.channel, 0, own, 0, 0, &second) == STATUS_INVALID_PARAMETER_3);
    MmBuildMdlForNonPagedPool(own);
    ROW(VmbChannelCreateGpadlFromMdl, "null", k.VmbChannelCreateGpadlFromMdl(client.channel, 0, NULL, 0, 0, &second) == STATUS_INVALID_PARAMETER_3);
    ROW(VmbChannelCreateGpadlFromMdl, "offset", k.VmbChannelCreateGpadlFromMdl(client.channel, 0, own, 5000, 0, &second) == STATUS_INVALID_PARAMETER_4);
    ROW(VmbChannelCreateGpadlFromMdl, "length", k.VmbChannelCreateGpadlFromMdl(client.channel, 0, own, 0, 5001, &second) == STATUS_INVALID_PARAMETER_5);
    ROW(VmbChannelCreateGpadlFromMdl, "null-output", k.VmbChannelCreateGpadlFromMdl(client.channel, 0, own, 0, 0, NULL) == STATUS_INVALID_PARAMETER_6);
    ROW(VmbChannelCreateGpadlFromMdl, "created", k.VmbChannelCreateGpadlFromMdl(client.channel, 0, own, 50, 100, &second) == STATUS_SUCCESS);
    NEED(k.VmbChannelMapGpadl(server.channel, 0, second, &mdl) == STATUS_SUCCESS);
    ROW(VmbChannelCreateGpadlFromMdl, "part", MmGetMdlByteCount(mdl) == 100 && MmGetMdlByteOffset(mdl) == 150);
    IoFreeMdl(own);

    NEED(k.VmbChannelCreateGpadlFromBuffer(client.channel, VMBUS_CHANNEL_GPADL_READ_ONLY, pages, 64, &read_only) == STATUS_SUCCESS);
    ROW(VmbChannelMapGpadl, "D-57-read-only", k.VmbChannelMapGpadl(server.channel, 0, read_only, &own) == STATUS_ACCESS_DENIED);
    ROW(VmbChannelMapGpadl, "read-only", k.VmbChannelMapGpadl(server.channel, VMBUS_CHANNEL_GPADL_FLAG_READ_ONLY, read_only, &own) == STATUS_SUCCESS);

    /* What is left is undone at the close (D-58). */
    k.VmbChannelDisable(client.channel);
    await(&server.closed);
    await_state(&server, KmclChannelClosed);
    k.VmbChannelUnmapGpadl(server.channel, second); /* gone */
    ROW(VmbChannelUnmapGpadl, "D-58", k.VmbChannelMapGpadl(server.channel, 0, second, &mdl) == STATUS_INVALID_DEVICE_STATE);
    end_pair();
    return end();
}
