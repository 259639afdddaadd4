// A base image as a Go program reads it: bindings of the functions for C.
//
// Why: replica engines are written in Go; what they need is an io.ReaderAt, and the extents.
// How: cgo on bedplate_replica.h. Build the library first, and say where it is:
//
//	cargo rustc -p bedplate-replica --release --features capi --crate-type staticlib
//	CGO_LDFLAGS="-L$PWD/target/release" go build -C tools/go-reader
//
// Never: hands memory of Go to the library for longer than one call.

package main

// #cgo CFLAGS: -I${SRCDIR}/../../src/replica
// #cgo LDFLAGS: -lbedplate_replica -lpthread -ldl -lm
// #include <stdlib.h>
// #include "bedplate_replica.h"
import "C"

import (
	"fmt"
	"io"
	"syscall"
	"time"
	"unsafe"
)

// Replica is a base image that is attached. Any number of goroutines may read it at once.
type Replica struct {
	handle *C.bedplate_replica
	size   int64
}

// Kind is how the bytes of an extent are had.
type Kind uint32

// Kinds of extents.
const (
	Data    Kind = C.BEDPLATE_DATA
	Zero    Kind = C.BEDPLATE_ZERO
	Encoded Kind = C.BEDPLATE_ENCODED
	Absent  Kind = C.BEDPLATE_ABSENT
)

// Extent is a range of one kind.
type Extent struct {
	At, Len uint64
	Kind    Kind
}

// Attach attaches to image, on the engine that listens at socket. With mapped, what is in memory is
// read without system calls. An engine that has gone is waited for as long as patience says (0: a
// minute). The error wraps the errno of bedplate_replica.h.
func Attach(socket, image string, mapped bool, patience time.Duration) (*Replica, error) {
	name, path := C.CString(image), C.CString(socket)
	defer C.free(unsafe.Pointer(name))
	defer C.free(unsafe.Pointer(path))
	var flags C.uint32_t
	if mapped {
		flags = C.BEDPLATE_REPLICA_MAPPED
	}
	var message [512]C.char
	replica := &Replica{}
	failed := C.bedplate_replica_attach(path, name, flags, C.uint32_t(patience.Milliseconds()),
		&replica.handle, &message[0], C.size_t(len(message)))
	if failed != 0 {
		return nil, fmt.Errorf("%s: %w", C.GoString(&message[0]), syscall.Errno(-failed))
	}
	replica.size = int64(C.bedplate_replica_size(replica.handle))
	return replica, nil
}

// Size is the length of the disk in bytes.
func (r *Replica) Size() int64 { return r.size }

// ReadAt fills buf with the disk's bytes from at on, as io.ReaderAt has it.
func (r *Replica) ReadAt(buf []byte, at int64) (int, error) {
	if at < 0 {
		return 0, syscall.EINVAL
	}
	if at >= r.size {
		return 0, io.EOF
	}
	wanted := len(buf)
	if left := r.size - at; int64(wanted) > left {
		buf = buf[:left]
	}
	if len(buf) == 0 {
		return 0, nil
	}
	failed := C.bedplate_replica_read_at(r.handle, unsafe.Pointer(&buf[0]), C.size_t(len(buf)),
		C.uint64_t(at))
	if failed != 0 {
		return 0, fmt.Errorf("read of %d bytes at %d: %w", len(buf), at, syscall.Errno(-failed))
	}
	if len(buf) < wanted {
		return len(buf), io.EOF
	}
	return len(buf), nil
}

// ExtentAt is what the disk is at at, and how far that goes, at most to limit bytes from there.
func (r *Replica) ExtentAt(at, limit uint64) (Extent, error) {
	var extent C.struct_bedplate_extent
	failed := C.bedplate_replica_extent_at(r.handle, C.uint64_t(at), C.uint64_t(limit), &extent)
	if failed != 0 {
		return Extent{}, fmt.Errorf("extent at %d: %w", at, syscall.Errno(-failed))
	}
	return Extent{uint64(extent.at), uint64(extent.len_bytes), Kind(extent.kind)}, nil
}

// Close ends the attachment. Nobody may use it meanwhile or after.
func (r *Replica) Close() error {
	C.bedplate_replica_free(r.handle)
	r.handle = nil
	return nil
}
