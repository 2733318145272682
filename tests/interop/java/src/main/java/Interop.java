import java.io.ByteArrayOutputStream;
import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.FileInputStream;
import java.io.FileReader;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.InetAddress;
import java.net.Socket;
import java.security.KeyStore;
import java.security.Principal;
import java.security.PrivateKey;
import java.security.Security;
import java.security.cert.CertificateFactory;
import java.security.cert.X509Certificate;
import java.util.Arrays;
import javax.net.ssl.KeyManager;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLServerSocket;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManagerFactory;
import javax.net.ssl.X509ExtendedKeyManager;
import org.bouncycastle.asn1.pkcs.PrivateKeyInfo;
import org.bouncycastle.jce.provider.BouncyCastleProvider;
import org.bouncycastle.jsse.provider.BouncyCastleJsseProvider;
import org.bouncycastle.openssl.PEMParser;
import org.bouncycastle.openssl.jcajce.JcaPEMKeyConverter;

/** One end of the tunnel over BouncyCastle's bctls; tests/interop/run.py says how it is called and what it prints. */
public final class Interop {
    private static final int NEW_CONN = 1, DATA = 2, INIT = 4, WELCOME = 5, WINDOW = 6, EOF = 7;
    private static final int PING = 8, PONG = 9, BLOCKED = 11;
    private static final int TOTAL = 1 << 20;
    private static final int OWN_WINDOW = 2 * TOTAL; // so nothing has to be granted
    private static final int MOST_SENT = 65527;

    private record Frame(int kind, int id, byte[] payload) {}

    private static final class Link {
        private final DataInputStream in;
        private final OutputStream out;

        Link(Socket socket) throws Exception {
            in = new DataInputStream(socket.getInputStream());
            out = socket.getOutputStream();
        }

        void send(int kind, int id, byte[] payload) throws Exception {
            ByteArrayOutputStream frame = new ByteArrayOutputStream();
            DataOutputStream header = new DataOutputStream(frame);
            header.writeByte(kind);
            header.writeInt(id);
            header.writeInt(payload.length);
            header.write(payload);
            out.write(frame.toByteArray());
            out.flush();
        }

        Frame read() throws Exception {
            int kind = in.readUnsignedByte();
            int id = in.readInt();
            byte[] payload = new byte[in.readInt()];
            in.readFully(payload);
            return new Frame(kind, id, payload);
        }

        /** Carries one stream: what comes goes back, or `own` goes out and comes back. */
        void echo(byte[] own) throws Exception {
            byte[] pending = own == null ? new byte[TOTAL] : own;
            int ready = own == null ? 0 : own.length, sent = 0, credit = 65536;
            byte[] got = new byte[TOTAL];
            int count = 0;
            boolean said = false, ended = own != null, sentEof = false, gotEof = false;
            while (!(sentEof && gotEof)) {
                while (sent < ready && credit > 0) {
                    int part = Math.min(Math.min(ready - sent, credit), MOST_SENT);
                    send(DATA, 1, Arrays.copyOfRange(pending, sent, sent + part));
                    sent += part;
                    credit -= part;
                    said = false;
                }
                if (sent < ready && !said) {
                    send(BLOCKED, 1, new byte[0]);
                    said = true;
                }
                if (sent == ready && ended && !sentEof) {
                    send(EOF, 1, new byte[0]);
                    sentEof = true;
                    continue;
                }
                Frame frame = read();
                if (frame.kind == PING) {
                    send(PONG, 0, frame.payload);
                } else if (frame.kind == WINDOW) {
                    credit += new DataInputStream(new java.io.ByteArrayInputStream(frame.payload)).readInt();
                } else if (frame.kind == DATA) {
                    System.arraycopy(frame.payload, 0, got, count, frame.payload.length);
                    count += frame.payload.length;
                    if (own == null) {
                        System.arraycopy(frame.payload, 0, pending, ready, frame.payload.length);
                        ready += frame.payload.length;
                    }
                } else if (frame.kind == EOF) {
                    gotEof = ended = true;
                } else if (frame.kind != PONG && frame.kind != BLOCKED) {
                    throw new IllegalStateException("frame " + frame.kind + " for stream " + frame.id);
                }
            }
            if (count != TOTAL || (own != null && !Arrays.equals(own, got))) {
                throw new IllegalStateException(count + " bytes came back");
            }
            System.out.println("echo " + count);
            // A close with bytes unread would be a reset: so only when all that was sent has arrived.
            send(PING, 0, "the last".getBytes());
            Frame answer = read();
            while (answer.kind != PONG || !new String(answer.payload).equals("the last")) {
                answer = read();
            }
        }
    }

    /** Shows its certificate whatever the other end asks for: that is to refuse what is wrong. */
    private static final class Shown extends X509ExtendedKeyManager {
        private static final String KIND = "ML-DSA-65";
        private final X509Certificate[] chain;
        private final PrivateKey key;

        Shown(X509Certificate[] chain, PrivateKey key) {
            this.chain = chain;
            this.key = key;
        }

        @Override public String[] getClientAliases(String kind, Principal[] issuers) {
            return new String[] {KIND};
        }

        @Override public String chooseClientAlias(String[] kinds, Principal[] issuers, Socket socket) {
            return Arrays.asList(kinds).contains(KIND) ? KIND : null;
        }

        @Override public String[] getServerAliases(String kind, Principal[] issuers) {
            return new String[] {KIND};
        }

        @Override public String chooseServerAlias(String kind, Principal[] issuers, Socket socket) {
            return kind.equals(KIND) ? KIND : null;
        }

        @Override public X509Certificate[] getCertificateChain(String alias) {
            return chain;
        }

        @Override public PrivateKey getPrivateKey(String alias) {
            return key;
        }
    }

    private static SSLContext context(String folder, String name) throws Exception {
        CertificateFactory certificates = CertificateFactory.getInstance("X.509", "BC");
        KeyStore roots = KeyStore.getInstance("PKCS12", "BC");
        roots.load(null, null);
        try (InputStream file = new FileInputStream(folder + "/ca.crt")) {
            roots.setCertificateEntry("ca", certificates.generateCertificate(file));
        }
        TrustManagerFactory trust = TrustManagerFactory.getInstance("PKIX", "BCJSSE");
        trust.init(roots);
        KeyManager[] keys = null;
        if (!name.equals("-")) {
            try (InputStream file = new FileInputStream(folder + "/" + name + ".crt");
                    PEMParser parser = new PEMParser(new FileReader(folder + "/" + name + ".key"))) {
                X509Certificate[] chain = certificates.generateCertificates(file).toArray(new X509Certificate[0]);
                PrivateKey key = new JcaPEMKeyConverter().setProvider("BC")
                    .getPrivateKey((PrivateKeyInfo) parser.readObject());
                keys = new KeyManager[] {new Shown(chain, key)};
            }
        }
        SSLContext context = SSLContext.getInstance("TLSv1.3", "BCJSSE");
        context.init(keys, trust.getTrustManagers(), null);
        return context;
    }

    private static SSLSocket dial(SSLContext context, String address) throws Exception {
        int colon = address.lastIndexOf(':');
        Socket plain = new Socket(address.substring(0, colon), Integer.parseInt(address.substring(colon + 1)));
        plain.setTcpNoDelay(true);
        return (SSLSocket) context.getSocketFactory().createSocket(plain, "localhost", plain.getPort(), true);
    }

    private static void shake(SSLSocket socket) throws Exception {
        long begun = System.nanoTime();
        socket.startHandshake();
        System.out.println("handshake " + (System.nanoTime() - begun) / 1000 / 1000.0);
    }

    private static void client(String address, String folder, String name, int times) throws Exception {
        SSLContext context = context(folder, name);
        for (; times > 1; times--) {
            SSLSocket socket = dial(context, address);
            shake(socket);
            socket.close();
        }
        SSLSocket socket = dial(context, address);
        socket.startHandshake();
        Link link = new Link(socket);
        String text = String.format("0:127.0.0.1:80\nversion=1\nwindow=%d\ninstance=%032x", OWN_WINDOW,
            ProcessHandle.current().pid());
        link.send(INIT, 0, text.getBytes());
        link.send(PING, 0, "12345678".getBytes());
        while (true) {
            Frame frame = link.read();
            if (frame.kind == WELCOME) {
                for (String line : new String(frame.payload).split("\n")) {
                    if (line.startsWith("port=")) {
                        System.out.println("welcome " + line.substring(5));
                    }
                }
            } else if (frame.kind == PING) {
                link.send(PONG, 0, frame.payload);
            } else if (frame.kind == NEW_CONN) {
                link.echo(null);
                socket.close();
                return;
            }
        }
    }

    private static void server(String folder, String name) throws Exception {
        SSLServerSocket listener = (SSLServerSocket) context(folder, name).getServerSocketFactory()
            .createServerSocket(0, 1, InetAddress.getByName("127.0.0.1"));
        listener.setNeedClientAuth(true);
        System.out.println("listening " + listener.getLocalPort());
        SSLSocket socket = (SSLSocket) listener.accept();
        shake(socket);
        Link link = new Link(socket);
        if (link.read().kind != INIT) {
            throw new IllegalStateException("no INIT");
        }
        System.out.println("init");
        link.send(WELCOME, 0, ("version=1\nport=4711\nwindow=" + OWN_WINDOW).getBytes());
        link.send(PING, 0, "12345678".getBytes());
        link.send(NEW_CONN, 1, "203.0.113.7:51234".getBytes());
        link.echo("0123456789abcdef".repeat(TOTAL / 16).getBytes());
        socket.close();
    }

    public static void main(String[] words) {
        try {
            if (words[0].equals("version")) {
                System.out.println(new BouncyCastleProvider().getInfo().replace(" Security Provider v", " ") + ", Java "
                    + System.getProperty("java.version"));
                return;
            }
            String group = words[words[0].equals("client") ? 4 : 3];
            System.setProperty("jdk.tls.namedGroups", group);
            // What it offers without these lacks ML-DSA.
            System.setProperty("jdk.tls.client.SignatureSchemes", "mldsa65,mldsa87");
            System.setProperty("jdk.tls.server.SignatureSchemes", "mldsa65,mldsa87");
            Security.insertProviderAt(new BouncyCastleProvider(), 1);
            Security.insertProviderAt(new BouncyCastleJsseProvider(), 2);
            if (words[0].equals("client")) {
                client(words[1], words[2], words[3], Integer.parseInt(words[5]));
            } else {
                server(words[1], words[2]);
            }
        } catch (Exception error) {
            System.out.println("failed " + error);
            System.exit(1);
        }
    }
}
