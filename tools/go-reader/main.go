// Reads a base image whole, on several goroutines at once, and prints its SHA-256 and what it is made
// of: an example of a replica engine in Go.
//
//	reader [-mapped] [-readers N] SOCKET IMAGE
package main

import (
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"os"
	"sync"
)

const pieceBytes = 256 << 10

func main() {
	mapped := flag.Bool("mapped", false, "read from maps")
	readers := flag.Int("readers", 4, "goroutines that read")
	flag.Parse()
	if flag.NArg() != 2 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(flag.Arg(0), flag.Arg(1), *mapped, *readers); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(socket, image string, mapped bool, readers int) error {
	replica, err := Attach(socket, image, mapped, 0)
	if err != nil {
		return err
	}
	defer replica.Close()
	if err := readAll(replica, readers); err != nil {
		return err
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, io.NewSectionReader(replica, 0, replica.Size())); err != nil {
		return err
	}
	bytes := map[Kind]uint64{}
	for at := uint64(0); at < uint64(replica.Size()); {
		extent, err := replica.ExtentAt(at, 1<<62)
		if err != nil {
			return err
		}
		bytes[extent.Kind] += extent.Len
		at += extent.Len
	}
	fmt.Printf("size %d\nsha256 %x\n", replica.Size(), hash.Sum(nil))
	fmt.Printf("data %d zero %d encoded %d absent %d\n",
		bytes[Data], bytes[Zero], bytes[Encoded], bytes[Absent])
	return nil
}

// Each goroutine reads all pieces, beginning somewhere else.
func readAll(replica *Replica, readers int) error {
	pieces := (replica.Size() + pieceBytes - 1) / pieceBytes
	errs := make(chan error, readers)
	var group sync.WaitGroup
	for reader := 0; reader < readers; reader++ {
		group.Add(1)
		go func(first int64) {
			defer group.Done()
			buf := make([]byte, pieceBytes)
			for n := int64(0); n < pieces; n++ {
				at := (first + n) % pieces * pieceBytes
				if _, err := replica.ReadAt(buf, at); err != nil && err != io.EOF {
					errs <- err
					return
				}
			}
		}(int64(reader) * pieces / int64(readers))
	}
	group.Wait()
	close(errs)
	return <-errs
}
