// go run post_image.go URL IMAGE: posts the image as a body, as a body of unknown length, after
// Expect: 100-continue, as a form, and prints each answer in a line.

package main

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

func post(url string, contentType string, body io.Reader, expect string) {
	request, err := http.NewRequest("POST", url, body)
	if err != nil {
		log.Fatal(err)
	}
	request.Header.Set("Content-Type", contentType)
	if expect != "" {
		request.Header.Set("Expect", expect)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		log.Fatal(err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(strings.TrimSpace(string(answer)))
}

func main() {
	url, path := os.Args[1], os.Args[2]
	image, err := os.ReadFile(path)
	if err != nil {
		log.Fatal(err)
	}
	post(url, "image/jpeg", bytes.NewReader(image), "")
	post(url, "image/jpeg", io.MultiReader(bytes.NewReader(image)), "")
	post(url, "image/jpeg", bytes.NewReader(image), "100-continue")
	var form bytes.Buffer
	writer := multipart.NewWriter(&form)
	part, err := writer.CreateFormFile("images", filepath.Base(path))
	if err != nil {
		log.Fatal(err)
	}
	part.Write(image)
	writer.Close()
	post(url, writer.FormDataContentType(), &form, "")
}
