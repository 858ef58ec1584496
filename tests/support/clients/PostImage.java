// java PostImage.java URL IMAGE: posts the image as a body, as a body of unknown length, as a form,
// and prints each answer in a line. By default this client offers h2c with every request.

import java.io.ByteArrayOutputStream;
import java.io.FileInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;

public class PostImage {
    public static void main(String[] arguments) throws Exception {
        String url = arguments[0];
        Path image = Path.of(arguments[1]);
        HttpClient client = HttpClient.newHttpClient();
        post(client, url, "image/jpeg", BodyPublishers.ofFile(image), false);
        post(client, url, "image/jpeg", BodyPublishers.ofInputStream(() -> open(image)), false);
        post(client, url, "image/jpeg", BodyPublishers.ofFile(image), true);
        ByteArrayOutputStream form = new ByteArrayOutputStream();
        String head = "--b\r\nContent-Disposition: form-data; name=\"images\"; "
                + "filename=\"" + image.getFileName() + "\"\r\nContent-Type: image/jpeg\r\n\r\n";
        form.write(head.getBytes(StandardCharsets.UTF_8));
        form.write(Files.readAllBytes(image));
        form.write("\r\n--b--\r\n".getBytes(StandardCharsets.UTF_8));
        BodyPublisher body = BodyPublishers.ofByteArray(form.toByteArray());
        post(client, url, "multipart/form-data; boundary=b", body, false);
    }

    private static FileInputStream open(Path path) {
        try {
            return new FileInputStream(path.toFile());
        } catch (java.io.IOException error) {
            throw new java.io.UncheckedIOException(error);
        }
    }

    private static void post(
            HttpClient client, String url, String type, BodyPublisher body, boolean expect)
            throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(url))
                .header("Content-Type", type)
                .expectContinue(expect)
                .POST(body)
                .build();
        System.out.println(client.send(request, BodyHandlers.ofString()).body());
    }
}
