// Clients of exec, attach and port-forward as Kubernetes has them, on client-go's own executors and dialers. What is
// asked and what is expected is the tests' business; here is what a client does with a URL.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
	"k8s.io/streaming/pkg/httpstream"
)

const usage = `usage: streams exec [flags] URL            one exec or attach; its exit code is ours
       streams many [flags]                many, of URLs on stdin, without stdin
       streams forward [flags] URL PORT    port-forward; see forward.go`

// How to reach the server, for all commands.
type dial struct {
	transport string
	ca, sni   string
}

func (d *dial) flags(set *flag.FlagSet) {
	set.StringVar(&d.transport, "r", "spdy", "spdy, websocket or fallback")
	set.StringVar(&d.ca, "ca", "", "file with the certificate that the server's is signed by")
	set.StringVar(&d.sni, "sni", "localhost", "name in the server's certificate")
}

func (d *dial) config() *rest.Config {
	config := &rest.Config{}
	if d.ca != "" {
		config.TLSClientConfig = rest.TLSClientConfig{CAFile: d.ca, ServerName: d.sni}
	}
	return config
}

func (d *dial) executor(address string) (remotecommand.Executor, error) {
	at, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	overSpdy, err := remotecommand.NewSPDYExecutor(d.config(), "POST", at)
	if err != nil || d.transport == "spdy" {
		return overSpdy, err
	}
	overWebSocket, err := remotecommand.NewWebSocketExecutor(d.config(), "GET", address)
	if err != nil || d.transport == "websocket" {
		return overWebSocket, err
	}
	return remotecommand.NewFallbackExecutor(overWebSocket, overSpdy, httpstream.IsUpgradeFailure)
}

func main() {
	if len(os.Args) < 2 {
		fail(errors.New(usage))
	}
	commands := map[string]func([]string) error{"exec": execute, "many": many, "forward": forward}
	command, known := commands[os.Args[1]]
	if !known {
		fail(errors.New(usage))
	}
	if err := command(os.Args[2:]); err != nil {
		fail(err)
	}
}

// Ends with the command's exit code; 255 is an error of the client's.
func fail(err error) {
	code := 255
	var exit exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		code = exit.ExitStatus()
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(code)
}

func execute(args []string) error {
	var d dial
	set := flag.NewFlagSet("exec", flag.ExitOnError)
	d.flags(set)
	stdin := set.Bool("i", false, "our stdin is the command's")
	tty := set.String("t", "", "a terminal; its sizes come out of this file, a line each")
	lines := set.Int("lines", 0, "so many numbered lines of 64 KiB are the command's stdin")
	sum := set.Bool("sum", false, "say only the length and SHA-256 of what comes")
	count := set.Bool("count", false, "say only the length of what comes and how long it took")
	leave := set.Duration("leave", 0, "leave after so long")
	_ = set.Parse(args)

	executor, err := d.executor(set.Arg(0))
	if err != nil {
		return err
	}
	var got int64
	hash := sha256.New()
	options := remotecommand.StreamOptions{Stdout: os.Stdout, Tty: *tty != ""}
	if !options.Tty {
		options.Stderr = os.Stderr
	}
	switch {
	case *sum:
		options.Stdout = io.MultiWriter(hash, (*counter)(&got))
	case *count:
		options.Stdout = (*counter)(&got)
	}
	switch {
	case *lines > 0:
		options.Stdin = &flood{left: *lines}
	case *stdin:
		options.Stdin = os.Stdin
	}
	if options.Tty {
		file, err := os.Open(*tty)
		if err != nil {
			return err
		}
		options.TerminalSizeQueue = sizes{bufio.NewScanner(file)}
	}
	ctx := context.Background()
	if *leave > 0 {
		within, cancel := context.WithTimeout(ctx, *leave)
		defer cancel()
		ctx = within
	}
	began := time.Now()
	err = executor.StreamWithContext(ctx, options)
	switch {
	case *sum:
		fmt.Printf("%d %x\n", got, hash.Sum(nil))
	case *count:
		fmt.Printf("%d %.6f\n", got, time.Since(began).Seconds())
	}
	return err
}

type counter int64

func (c *counter) Write(bytes []byte) (int, error) {
	*c += counter(len(bytes))
	return len(bytes), nil
}

// What the program flood of the test images prints with lines of 64 KiB.
type flood struct {
	next, left int
	line       []byte
}

func (f *flood) Read(to []byte) (int, error) {
	if len(f.line) == 0 {
		if f.left == 0 {
			return 0, io.EOF
		}
		head := fmt.Sprintf("%012d ", f.next)
		f.line = []byte(head + strings.Repeat("x", 64<<10-len(head)-1) + "\n")
		f.next, f.left = f.next+1, f.left-1
	}
	n := copy(to, f.line)
	f.line = f.line[n:]
	return n, nil
}

// Sizes like 80x24, a line each.
type sizes struct{ lines *bufio.Scanner }

func (s sizes) Next() *remotecommand.TerminalSize {
	var size remotecommand.TerminalSize
	if !s.lines.Scan() {
		return nil
	}
	if _, err := fmt.Sscanf(s.lines.Text(), "%dx%d", &size.Width, &size.Height); err != nil {
		return nil
	}
	return &size
}

// Says of every URL, in the order they end, the bytes that came, the seconds until the first and all of them, or why
// it failed.
func many(args []string) error {
	var d dial
	set := flag.NewFlagSet("many", flag.ExitOnError)
	d.flags(set)
	at := set.Int("at", 1, "so many at a time")
	_ = set.Parse(args)

	urls := make(chan string)
	var running sync.WaitGroup
	for range *at {
		running.Go(func() {
			for address := range urls {
				fmt.Println(one(&d, address))
			}
		})
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		urls <- lines.Text()
	}
	close(urls)
	running.Wait()
	return lines.Err()
}

func one(d *dial, address string) string {
	executor, err := d.executor(address)
	if err != nil {
		return "failed: " + err.Error()
	}
	out := &first{began: time.Now()}
	options := remotecommand.StreamOptions{Stdout: out, Stderr: io.Discard}
	if err := executor.StreamWithContext(context.Background(), options); err != nil {
		return "failed: " + err.Error()
	}
	return fmt.Sprintf("%d %.6f %.6f", out.bytes, out.after.Seconds(), time.Since(out.began).Seconds())
}

type first struct {
	began time.Time
	after time.Duration
	bytes int
}

func (f *first) Write(bytes []byte) (int, error) {
	if f.bytes == 0 {
		f.after = time.Since(f.began)
	}
	f.bytes += len(bytes)
	return len(bytes), nil
}

func (d *dial) dialer(address string) (httpstream.Dialer, error) {
	at, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	if d.transport == "websocket" {
		return tunnel(at, d.config())
	}
	transport, upgrader, err := spdy.RoundTripperFor(d.config())
	if err != nil {
		return nil, err
	}
	return spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, "POST", at), nil
}
