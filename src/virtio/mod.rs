//! virtio 1.2: queues, the PCI transport, the worker loop, the devices. Knows no image formats,
//! no graph and no QMP.
