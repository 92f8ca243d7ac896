package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/streaming/pkg/httpstream"
)

func tunnel(at *url.URL, config *rest.Config) (httpstream.Dialer, error) {
	return portforward.NewSPDYOverWebsocketDialerForStreaming(at, config)
}

// One port-forward, its pairs of streams opened by hand: tools/portforward gives the whole connection up when one
// port refuses. The server at the port says hello, hangs up its own side at a line "enough", and otherwise echoes.
func forward(args []string) error {
	var d dial
	set := flag.NewFlagSet("forward", flag.ExitOnError)
	d.flags(set)
	refused := set.String("refused", "", "a port that nobody listens on, tried first")
	parallel := set.Int("parallel", 0, "so many connections at a time, each echoing 100 kB")
	serial := set.Int("serial", 0, "so many connections one after another, each hung up by the port")
	lines := set.Int("lines", 0, "echo so many lines of 64 KiB")
	_ = set.Parse(args)

	dialer, err := d.dialer(set.Arg(0))
	if err != nil {
		return err
	}
	connection, _, err := dialer.Dial(portforward.PortForwardProtocolV1Name)
	if err != nil {
		return err
	}
	defer connection.Close()
	f := forwarded{connection: connection, port: set.Arg(1)}

	if *refused != "" {
		_, failure, err := (&forwarded{connection: connection, port: *refused}).open(0)
		if err != nil {
			return err
		}
		text, err := io.ReadAll(failure)
		if err != nil {
			return fmt.Errorf("error stream of a refused port: %w", err)
		}
		fmt.Printf("refused: %s\n", text)
	}
	errs := make([]error, *parallel)
	var running sync.WaitGroup
	for n := range *parallel {
		running.Go(func() { errs[n] = f.echo(n+1, bytes.Repeat([]byte{byte(n)}, 100_000)) })
	}
	running.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	began := time.Now()
	for n := range *serial {
		if err := f.brief(*parallel + n + 1); err != nil {
			return err
		}
	}
	if *serial > 0 {
		fmt.Printf("serial: %.6f\n", time.Since(began).Seconds())
		return nil
	}
	if *lines > 0 {
		return f.pour(*parallel+1, *lines)
	}
	return f.hungUp(*parallel + 1)
}

type forwarded struct {
	connection httpstream.Connection
	port       string
}

func (f *forwarded) open(request int) (data, failure httpstream.Stream, err error) {
	headers := http.Header{}
	headers.Set(v1.StreamType, v1.StreamTypeError)
	headers.Set(v1.PortHeader, f.port)
	headers.Set(v1.PortForwardRequestIDHeader, strconv.Itoa(request))
	if failure, err = f.connection.CreateStream(headers); err != nil {
		return nil, nil, err
	}
	// Never used in this direction.
	_ = failure.Close()
	headers.Set(v1.StreamType, v1.StreamTypeData)
	data, err = f.connection.CreateStream(headers)
	return data, failure, err
}

// Our half-close goes to the port, and everything comes back before its half-close does.
func (f *forwarded) echo(request int, text []byte) error {
	data, failure, err := f.open(request)
	if err != nil {
		return err
	}
	defer f.connection.RemoveStreams(data, failure)
	go func() {
		_, _ = data.Write(text)
		_ = data.Close()
	}()
	got, err := io.ReadAll(data)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, append([]byte("hello\n"), text...)) {
		return fmt.Errorf("connection %d: %d bytes came back of %d", request, len(got), len(text))
	}
	return quiet(failure)
}

func quiet(failure io.Reader) error {
	text, err := io.ReadAll(failure)
	if err != nil {
		return fmt.Errorf("error stream: %w", err)
	}
	if len(text) > 0 {
		return fmt.Errorf("error stream says %q", text)
	}
	return nil
}

func (f *forwarded) pour(request, lines int) error {
	data, failure, err := f.open(request)
	if err != nil {
		return err
	}
	began := time.Now()
	go func() { _, _ = io.Copy(data, &flood{left: lines}) }()
	got, err := io.CopyN(io.Discard, data, int64(len("hello\n")+lines<<16))
	fmt.Printf("poured: %d %.6f\n", got, time.Since(began).Seconds())
	_ = data.Close()
	return errors.Join(err, quiet(failure))
}

// Both ends hang up by themselves: containerd waits a second for the one that does not.
func (f *forwarded) brief(request int) error {
	data, failure, err := f.open(request)
	if err != nil {
		return err
	}
	defer f.connection.RemoveStreams(data, failure)
	if _, err := data.Write([]byte("enough\n")); err != nil {
		return err
	}
	_ = data.Close()
	if got, err := io.ReadAll(data); err != nil || string(got) != "hello\n" {
		return fmt.Errorf("a brief connection: %q, %v", got, err)
	}
	return quiet(failure)
}

// The port's half-close comes to us, and it hears us all the same.
func (f *forwarded) hungUp(request int) error {
	data, failure, err := f.open(request)
	if err != nil {
		return err
	}
	if _, err := data.Write([]byte("enough\n")); err != nil {
		return err
	}
	if got, err := io.ReadAll(data); err != nil || string(got) != "hello\n" {
		return fmt.Errorf("before the port hung up: %q, %v", got, err)
	}
	if _, err := data.Write([]byte("still heard")); err != nil {
		return err
	}
	_ = data.Close()
	return quiet(failure)
}
