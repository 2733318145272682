// One end of the tunnel over Go's crypto/tls; tests/interop/run.py says how it is called and what it prints.
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"time"
)

const (
	newConn, data, initial, welcome, window, eof, ping, pong, blocked = 1, 2, 4, 5, 6, 7, 8, 9, 11

	total     = 1 << 20
	ownWindow = 2 * total // so nothing has to be granted
	mostSent  = 65527
)

var groups = map[string]tls.CurveID{
	"X25519MLKEM768":     tls.X25519MLKEM768,
	"SecP384r1MLKEM1024": tls.SecP384r1MLKEM1024,
	"X25519":             tls.X25519,
}

func check(err error) {
	if err != nil {
		fmt.Println("failed", err)
		os.Exit(1)
	}
}

func send(conn io.Writer, kind byte, id uint32, payload []byte) {
	frame := binary.BigEndian.AppendUint32([]byte{kind}, id)
	frame = binary.BigEndian.AppendUint32(frame, uint32(len(payload)))
	_, err := conn.Write(append(frame, payload...))
	check(err)
}

func read(conn io.Reader) (byte, uint32, []byte) {
	var header [9]byte
	_, err := io.ReadFull(conn, header[:])
	check(err)
	payload := make([]byte, binary.BigEndian.Uint32(header[5:]))
	_, err = io.ReadFull(conn, payload)
	check(err)
	return header[0], binary.BigEndian.Uint32(header[1:]), payload
}

func settings(role, folder, name, group string) *tls.Config {
	roots := x509.NewCertPool()
	pem, err := os.ReadFile(folder + "/ca.crt")
	check(err)
	roots.AppendCertsFromPEM(pem)
	config := &tls.Config{
		MinVersion:       tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{groups[group]},
		RootCAs:          roots, ClientCAs: roots, ServerName: "localhost",
		ClientAuth:             tls.RequireAndVerifyClientCert,
		SessionTicketsDisabled: true,
	}
	if name != "-" {
		pair, err := tls.LoadX509KeyPair(folder+"/"+name+".crt", folder+"/"+name+".key")
		check(err)
		config.Certificates = []tls.Certificate{pair}
		// Sent whatever the other end asks for: it is to refuse what is wrong.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return config
}

// echo carries one stream: what comes goes back, or `own` goes out and comes back.
func echo(conn io.ReadWriter, credit int, own []byte) {
	pending, got, said, ended := own, []byte(nil), false, own != nil
	for sentEOF, gotEOF := false, false; !(sentEOF && gotEOF); {
		for len(pending) > 0 && credit > 0 {
			count := min(len(pending), credit, mostSent)
			send(conn, data, 1, pending[:count])
			pending, credit, said = pending[count:], credit-count, false
		}
		if len(pending) > 0 && !said {
			send(conn, blocked, 1, nil)
			said = true
		}
		if len(pending) == 0 && ended && !sentEOF {
			send(conn, eof, 1, nil)
			sentEOF = true
			continue
		}
		switch kind, id, payload := read(conn); {
		case kind == ping:
			send(conn, pong, 0, payload)
		case kind == window && id == 1:
			credit += int(binary.BigEndian.Uint32(payload))
		case kind == data && id == 1 && own == nil:
			pending = append(pending, payload...)
			got = append(got, payload...)
		case kind == data && id == 1:
			got = append(got, payload...)
		case kind == eof && id == 1:
			gotEOF, ended = true, true
		case kind == pong || kind == blocked:
		default:
			check(fmt.Errorf("frame %d for stream %d", kind, id))
		}
	}
	if len(got) != total || (own != nil && !bytes.Equal(got, own)) {
		check(fmt.Errorf("%d bytes came back", len(got)))
	}
	fmt.Println("echo", len(got))
	// A close with bytes unread would be a reset: so only when all that was sent has arrived.
	send(conn, ping, 0, []byte("the last"))
	for {
		if kind, _, payload := read(conn); kind == pong && string(payload) == "the last" {
			return
		}
	}
}

func client(address, folder, name, group string, times int) {
	config := settings("client", folder, name, group)
	for ; times > 1; times-- { // the first ones warm it up, and are measured
		conn, err := net.Dial("tcp", address)
		check(err)
		secure := tls.Client(conn, config)
		begun := time.Now()
		check(secure.Handshake())
		fmt.Println("handshake", float64(time.Since(begun).Microseconds())/1000)
		secure.Close()
	}
	conn, err := tls.Dial("tcp", address, config)
	check(err)
	text := fmt.Sprintf("0:127.0.0.1:80\nversion=1\nwindow=%d\ninstance=%032x", ownWindow, os.Getpid())
	send(conn, initial, 0, []byte(text))
	send(conn, ping, 0, []byte("12345678"))
	for {
		kind, _, payload := read(conn)
		switch kind {
		case welcome:
			for line := range bytes.SplitSeq(payload, []byte("\n")) {
				if port, is := bytes.CutPrefix(line, []byte("port=")); is {
					fmt.Println("welcome", string(port))
				}
			}
		case ping:
			send(conn, pong, 0, payload)
		case newConn:
			echo(conn, 65536, nil)
			conn.Close()
			return
		}
	}
}

func server(folder, name, group string) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	fmt.Println("listening", listener.Addr().(*net.TCPAddr).Port)
	raw, err := listener.Accept()
	check(err)
	conn := tls.Server(raw, settings("server", folder, name, group))
	begun := time.Now()
	check(conn.Handshake())
	fmt.Println("handshake", float64(time.Since(begun).Microseconds())/1000)
	kind, _, _ := read(conn)
	if kind != initial {
		check(fmt.Errorf("frame %d instead of INIT", kind))
	}
	fmt.Println("init")
	send(conn, welcome, 0, fmt.Appendf(nil, "version=1\nport=4711\nwindow=%d", ownWindow))
	send(conn, ping, 0, []byte("12345678"))
	send(conn, newConn, 1, []byte("203.0.113.7:51234"))
	own := bytes.Repeat([]byte("0123456789abcdef"), total/16)
	echo(conn, 65536, own)
	conn.Close()
}

func main() {
	switch os.Args[1] {
	case "version":
		fmt.Println(runtime.Version())
	case "client":
		times, err := strconv.Atoi(os.Args[6])
		check(err)
		client(os.Args[2], os.Args[3], os.Args[4], os.Args[5], times)
	case "server":
		server(os.Args[2], os.Args[3], os.Args[4])
	}
}
